"""The Brownian path: its law, and that it is a function of time."""

import pytest
import torch

from scoresde import InputError
from scoresde.solvers import BrownianPath
from scoresde.streams import Streams

N = 10_000


def path(n=N, size=1, dtype=torch.float64, seed=0):
    return BrownianPath(Streams.of(seed, batch=n), size, dtype)


def check_covariance(rows, truth):
    """Each entry within four standard errors of what Gaussian rows have."""
    truth = torch.tensor(truth, dtype=torch.float64)
    scale = truth.diagonal().sqrt()
    error = (rows @ rows.T / rows.shape[1] - truth) / torch.outer(scale, scale)
    assert float(error.abs().max()) < 4 * (2 / rows.shape[1]) ** 0.5


def test_values_have_the_covariance_of_brownian_motion():
    """min(s, t), at times of the tree and between them, in no order."""
    motion, times = path(), [0.7, 0.1, 1.0, 0.25, 1 / 3]
    rows = torch.stack([motion(t)[:, 0] for t in times])
    check_covariance(rows, [[min(s, t) for t in times] for s in times])


def test_increments_and_integrals_have_their_covariance():
    motion, a, b = path(), 0.2, 0.4
    rows = torch.cat(
        [
            torch.stack(motion.with_integral(*ends))[..., 0]
            for ends in ((0.1, 0.1 + a), (0.5, 0.5 + b))
        ]
    )
    truth = [
        [a, a**2 / 2, 0, 0],
        [a**2 / 2, a**3 / 3, 0, 0],
        [0, 0, b, b**2 / 2],
        [0, 0, b**2 / 2, b**3 / 3],
    ]
    check_covariance(rows, truth)


def test_it_is_the_same_path_whatever_is_asked_and_in_whatever_order():
    times = [0.9, 0.3, 0.30001, 0.5, 0.0, 1.0]
    one, other = path(4), path(4)
    forwards = [one(t) for t in times]
    backwards = [other(t) for t in reversed(times)][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_increments_and_integrals_add_up():
    motion, (s, t, u) = path(4), (0.11, 0.4, 0.83)
    (w1, i1), (w2, i2), (w, i) = (motion.with_integral(*ends) for ends in ((s, t), (t, u), (s, u)))
    torch.testing.assert_close(w1 + w2, w)
    torch.testing.assert_close(i1 + i2 + (u - t) * w1, i)


def test_a_time_of_its_own_for_each_example_gives_the_same_values():
    times = torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0], dtype=torch.float64)
    motion = path(5, size=3)
    shared = torch.stack([motion(float(t))[i] for i, t in enumerate(times)])
    torch.testing.assert_close(motion(times), shared, rtol=0, atol=1e-12)


def test_an_example_has_its_path_alone_and_in_any_batch():
    batch = path(8, size=3)(0.3)
    alone = BrownianPath(Streams.of(0, [5]), 3, torch.float64)(0.3)
    assert torch.equal(alone[0], batch[5])
    assert not torch.equal(batch[4], batch[5])


def test_float32_is_that_path_rounded():
    a, b = path(4, dtype=torch.float32)(0.3), path(4)(0.3)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 31])
def test_an_unusable_depth_is_refused(depth):
    with pytest.raises(InputError, match=f"depth.*{depth}"):
        BrownianPath(Streams.of(0, batch=1), 1, depth=depth)
