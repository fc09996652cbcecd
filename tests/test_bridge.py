"""A process that is no SDE, and a model of it, go through training, sampling and checkpoints."""

import functools

import pytest
import torch

from scoresde import DenoisingScoreMatching, InputError
from scoresde.data import two_moons
from scoresde.nn import MLP
from scoresde.sample import ProbabilityFlow, UniPC
from scoresde.sde import derivative
from scoresde.train import Checkpoint, Replicated, Training, Update, read_metrics, train
from tests.bridges import Bridge, BridgeNetwork, Degraded, GaussianPairs, Regression, Restorer

COUNT = 4000
ERROR = 1 / COUNT**0.5  # of the mean of a variable of unit variance; times 1.4, of its variance
BRIDGES = [Bridge(), Bridge(0.3)]
each_bridge = pytest.mark.parametrize("bridge", BRIDGES, ids=repr)
RECIPE = {
    "model": {
        "_target_": "tests.bridges.BridgeNetwork",
        "network": {
            "_target_": "scoresde.nn.MLP",
            **{"shape": [2], "width": 32, "depth": 1, "conditions": {"source": 2}},
        },
        "process": {"_target_": "tests.bridges.Bridge", "scale": 0.0},
    }
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(bridge, kind=GaussianPairs):
    """Both ends have axes in common, so that the flow between them has a closed form."""
    turn = torch.linalg.qr(normal(2, 2, seed=1)).Q
    axes = torch.tensor([[[0.5, 0.3], [0.2, -0.3]], [[0.2, -0.3], [0.4, 1.5]]]).double()
    covariances = torch.einsum("ak,ijk,bk->ijab", turn, axes, turn)
    return kind(bridge, torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double(), covariances)


def pairs(model, count=COUNT):
    c = model.covariances
    joint = torch.cat([torch.cat([*row], 1) for row in c], 0)
    z = normal(count, 4, seed=2) @ torch.linalg.cholesky(joint).T
    return model.means[0] + z[:, :2], model.means[1] + z[:, 2:]


def covariance(x, y):
    return (x - x.mean(0)).T @ (y - y.mean(0)) / (len(x) - 1)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def network(bridge=BRIDGES[0]):
    torch.manual_seed(0)
    return BridgeNetwork(MLP(2, width=32, depth=1, conditions={"source": 2}), bridge)


# --- The exact model -----------------------------------------------------------------------------


@each_bridge
def test_the_stated_rate_of_the_noise_is_its_derivative(bridge):
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    rate = derivative(bridge.gamma, t) * bridge.gamma(t)
    torch.testing.assert_close(bridge.gamma_rate(t), rate)


@each_bridge
def test_the_exact_model_carries_the_law_along(bridge):
    """Continuity: the mean moves by E[u], the covariance by cov(u, x) and its transpose."""
    model, t = gaussian(bridge), torch.tensor(0.37, dtype=torch.float64)
    mean, covariance_t = model.law(t)
    rates = [torch.func.jacfwd(lambda s, i=i: model.law(s)[i])(t) for i in (0, 1)]
    at_mean = model.velocity(mean[None], t)[0]
    torch.testing.assert_close(at_mean, rates[0])
    jacobian = torch.func.jacfwd(lambda x: model.velocity(x[None], t)[0])(mean)
    moved = jacobian @ covariance_t
    torch.testing.assert_close(moved + moved.T, rates[1])


@each_bridge
def test_the_flow_of_the_exact_model_has_the_law_of_the_data(bridge):
    model = gaussian(bridge)
    _, source = pairs(model)
    flow = ProbabilityFlow(eps=0.0, rtol=1e-6, atol=1e-6)
    found = flow(model, shape=(COUNT, 2), seed=0, source=source)
    x, (m0, m1), c = found.x, model.means, model.covariances
    assert int(found.nfe.min()) > 0
    # The map that carries one Gaussian to another of the same axes, sample by sample.
    there = root(c[0, 0]) @ torch.linalg.inv(root(c[1, 1]))
    torch.testing.assert_close(x, m0 + (source - m1) @ there.T, rtol=0, atol=1e-4)
    # The law, with five Monte-Carlo errors (of unit variances 0.016, and 0.022 for variances).
    torch.testing.assert_close(x.mean(0), m0, rtol=0, atol=5 * ERROR)
    torch.testing.assert_close(covariance(x, x), c[0, 0], rtol=0, atol=5 * 1.4 * ERROR)
    cross = root(c[0, 0]) @ root(c[1, 1])
    torch.testing.assert_close(covariance(x, source), cross, rtol=0, atol=5 * 1.4 * ERROR)
    back = flow.encode(model, x, source=source).x
    torch.testing.assert_close(back, source, rtol=0, atol=5e-4)  # errors grow on the way


def test_given_the_source_the_flow_ends_at_the_mean_of_the_posterior():
    model = gaussian(Bridge(), Restorer)
    _, source = pairs(model)
    (m0, m1), c = model.means, model.covariances
    x = ProbabilityFlow(eps=0.0)(model, shape=(COUNT, 2), seed=0, source=source).x
    gain = c[0, 1] @ torch.linalg.inv(c[1, 1])
    torch.testing.assert_close(x, m0 + (source - m1) @ gain.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(covariance(x, source), c[0, 1], rtol=0, atol=5 * 1.4 * ERROR)
    explained = gain @ c[1, 0]
    torch.testing.assert_close(covariance(x, x), explained, rtol=0, atol=5 * 1.4 * ERROR)


def test_a_bridge_needs_a_source():
    with pytest.raises(InputError, match="source"):
        ProbabilityFlow()(gaussian(Bridge()), shape=(2, 2), seed=0)


def test_what_needs_an_sde_refuses_a_bridge():
    model, x = gaussian(Bridge()), torch.zeros(2, 2)
    for act in (
        lambda: UniPC(steps=4)(model, shape=(2, 2), seed=0, source=x),
        lambda: DenoisingScoreMatching()(model, x),
        lambda: DenoisingScoreMatching().check(model),
    ):
        with pytest.raises(InputError, match="ScoreFunction"):
            act()


# --- Losses --------------------------------------------------------------------------------------


@each_bridge
def test_the_loss_of_the_exact_model_is_the_least(bridge):
    r"""It is the variance that is left, :math:`\mathrm{tr}(C_{00} - c_{0t} C_t^{-1} c_{t0})/2`."""
    model, t = gaussian(bridge), torch.tensor(0.4, dtype=torch.float64)
    x, source = pairs(model)
    value = Regression()(model, x, t, seed=0, source=source)
    w, c = model.weights(t), model.covariances
    shared = torch.einsum("j,jab->ab", w, c[0])
    left = c[0, 0] - shared @ torch.linalg.solve(model.law(t)[1], shared.T)
    error = float(value.std()) * ERROR
    assert float(value.mean()) == pytest.approx(float(left.trace()) / 2, abs=5 * error)


@each_bridge
def test_the_gradient_of_the_loss_is_its_slope(bridge):
    model = network(bridge).double()
    x, source = pairs(gaussian(bridge), 16)

    def loss():
        return Regression()(model, x, seed=0, source=source).mean()

    loss().backward()
    weight = model.network.linear_out.weight
    with torch.no_grad():
        weight[0, 3] += 1e-5
        above = loss()
        weight[0, 3] -= 2e-5
        slope = (above - loss()) / 2e-5
    assert float(slope) == pytest.approx(float(weight.grad[0, 3]), rel=1e-6)


# --- Training ------------------------------------------------------------------------------------


@each_bridge
def test_a_network_learns_a_bridge(bridge):
    exact, model = gaussian(bridge), network(bridge)
    x, source = (part.float() for part in pairs(exact))
    make = functools.partial(torch.optim.Adam, lr=1e-2)
    update = Update(model, Regression(), Training(steps=300, accumulate=2), make, Replicated())
    losses = []
    for step in range(300):
        rows = torch.arange(128) + 128 * step
        losses.append(update(x[rows % COUNT], {"source": source[rows % COUNT]}, step, 128)[0])
        assert 0 < float(update.parts["early"]) < float(losses[-1])
    assert float(torch.stack(losses[-20:]).mean()) < 0.35 * float(losses[0])
    trained = update.averages[0].model
    found = ProbabilityFlow(rtol=1e-3, atol=1e-3)(trained, shape=(COUNT, 2), seed=0, source=source)
    # What a small network learns in 300 updates: the mean, and what the source says.
    torch.testing.assert_close(found.x.mean(0), x.mean(0), rtol=0, atol=0.15)
    cross, expected = covariance(found.x, source), exact.covariances[0, 1].float()
    torch.testing.assert_close(cross, expected, rtol=0, atol=0.15)


def test_the_loop_trains_a_bridge_and_its_checkpoint_builds_it(tmp_path):
    average = train(
        network(),
        two_moons(count=200),
        Degraded(),
        Training(steps=8, batch_size=16, log_every=4, validate_every=4, snapshots=2),
        functools.partial(torch.optim.Adam, lr=1e-3),
        tmp_path,
        recipe=RECIPE,
        progress=False,
    )
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "validation_loss" in r] == [4, 8]
    assert all(r["part/early"] > 0 for r in records if "loss" in r)
    assert not any(name.startswith("noise_error") for r in records for name in r)
    checkpoint = Checkpoint.load(tmp_path)
    with pytest.raises(InputError, match="allow=tests"):
        checkpoint.build_model()
    built = checkpoint.build_model(allow=["tests"])
    source = normal(5, 2).float()
    one, two = (
        ProbabilityFlow()(m, shape=(5, 2), seed=0, source=source).x for m in (average, built)
    )
    assert torch.equal(one, two)
    assert built.process == Bridge()
