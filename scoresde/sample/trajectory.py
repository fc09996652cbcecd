"""Trajectories of samples, and interpolation between latents."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.errors import InputError, check_count
from scoresde.model import ScoreFunction, evaluating
from scoresde.sample.base import Sampler, Samples, Step
from scoresde.streams import fresh_seed


@dataclass(frozen=True)
class Trajectory:
    """States along the path of samples from noise to data, with their denoised estimates.

    Arguments:
        t: Decreasing times, float64 ``(T, B)``.
        x: States, with shape ``(T, B, *)``.
        denoised: Denoised estimate of each state, with shape ``(T, B, *)``.
    """

    t: Tensor
    x: Tensor
    denoised: Tensor


def sample_trajectory(
    model: ScoreFunction,
    sampler: Sampler,
    latent: Tensor,
    *,
    points: int = 10,
    seed: int | None = None,
    seeds: Iterable[int] | None = None,
    callback: Callable[[Step], object] | None = None,
    **cond: Tensor,
) -> tuple[Samples, Trajectory]:
    """Draws samples and keeps states at equal intervals of steps.

    The model is evaluated once more at every state that is kept. The samples' ``nfe`` does not
    include these evaluations.

    Arguments:
        model: A score function.
        sampler: A sampler.
        latent: States at time 1, with shape ``(B, *)`` (see :meth:`Sampler.latent`).
        points: Maximum number of states to keep, including the first and the last, at least 2.
        seed: Seed of the random streams.
        seeds: Index of each sample's stream; ``range(B)`` by default.
        callback: Called with a :class:`Step` after every step.
        **cond: Conditions for the network, each with shape ``(B, *)``.

    Raises:
        InputError: If there are fewer than 2 points, or an argument is invalid.
    """
    memory = _Memory(points)
    memory(torch.ones((), dtype=torch.float64), latent)

    def remember(step: Step) -> None:
        memory(step.t, step.x)
        if callback is not None:
            callback(step)

    seed = fresh_seed() if seed is None else seed
    samples = sampler(
        model,
        latent=latent,
        seed=seed,
        seeds=seeds,
        callback=remember,
        **cond,  # type: ignore[arg-type]
    )
    t, x = memory.chosen()
    with torch.no_grad(), evaluating(model):
        denoised = [
            model.denoise(model.state(state), time.clamp(max=1), **cond).cpu()
            for time, state in zip(t, x, strict=True)
        ]
    times = torch.stack([time.cpu().expand(len(latent)) for time in t])
    states = torch.stack([state.cpu() for state in x])
    return samples, Trajectory(times, states, torch.stack(denoised))


class _Memory:
    """Store of states at equal distances, for a number of steps that is not known in advance."""

    def __init__(self, points: int) -> None:
        if check_count("points", points) < 2:
            raise InputError("points must be at least 2, got 1.")
        self.points = points
        self.stride, self.seen = 1, 0
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, x: Tensor) -> None:
        self.last = (t, x.clone())
        if self.seen % self.stride == 0:
            self.kept.append(self.last)
            if len(self.kept) > 4 * self.points:  # too many: keep every other one
                del self.kept[1::2]
                self.stride *= 2
        self.seen += 1

    def chosen(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the times and the states of the points."""
        assert self.last is not None
        # The numbers of the kept states and of the last state.
        all_ = self.kept if self.kept[-1] is self.last else [*self.kept, self.last]
        places = [self.stride * i for i in range(len(self.kept))]
        places += [self.seen - 1] * (len(all_) - len(places))
        count = min(self.points, len(all_))
        wanted = [i * (self.seen - 1) / max(1, count - 1) for i in range(count)]
        nearest = {min(range(len(all_)), key=lambda i: abs(places[i] - w)) for w in wanted}
        pairs = [all_[i] for i in sorted(nearest)]
        return [t for t, _ in pairs], [x for _, x in pairs]


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    r"""Interpolates between latents along great circles.

    .. math:: \frac{\sin((1 - u) \theta)}{\sin \theta} a + \frac{\sin(u \theta)}{\sin \theta} b,
              \qquad \cos\theta = \frac{\langle a, b \rangle}{\|a\| \|b\|},

    for each example. Latents of high dimension lie near a sphere, which a straight line leaves;
    where a and b are independent :math:`N(0, s^2 I)`, the result has nearly that law.

    Arguments:
        a: Latents, with shape ``(B, *)``.
        b: Latents, likewise.
        share: Weights u of b, in [0, 1], with shape ``(n,)``.

    Returns:
        The interpolated latents, with shape ``(B, n, *)``.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> slerp(a, b, torch.tensor([0.5]))
        tensor([[[0.7071, 0.7071]]])
    """
    if a.shape != b.shape:
        raise InputError(
            f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    one, other = (nn.functional.normalize(v) for v in (flat_a, flat_b))
    # The half-angle form: exact for nearly parallel vectors too.
    theta = 2 * torch.atan2((one - other).norm(dim=1), (one + other).norm(dim=1))[:, None]
    u = share.to(theta)[None]
    sine = torch.sin(theta)
    straight = sine < 1e-6  # parallel, where the line is the arc; opposite ones have no arc
    from_a = torch.where(straight, 1 - u, torch.sin((1 - u) * theta) / sine)
    from_b = torch.where(straight, u, torch.sin(u * theta) / sine)
    between = from_a[:, :, None] * flat_a[:, None] + from_b[:, :, None] * flat_b[:, None]
    return between.to(a.dtype).reshape(len(a), len(share), *a.shape[1:])
