"""Bridges between examples and observations, by the laws of jointly Gaussian pairs."""

import math

import pytest
import torch

from scoresde import InputError, RectifiedFlow, ScoreModel, fit, load
from scoresde.loss import BridgeVelocityWeighting, DataWeighting, Paired
from scoresde.model import (
    BridgeModel,
    DataOutput,
    DataParametrisation,
    GaussianBridge,
    GaussianModel,
    ResidualOutput,
    ScaledTime,
)
from scoresde.nn import MLP
from scoresde.sample import Euler, ProbabilityFlow, Restore, UniPC
from scoresde.sde import (
    I2SB,
    VPSDE,
    Brownian,
    Constant,
    InDI,
    NoiseLaw,
    derivative,
)
from scoresde.streams import Purpose, Streams
from scoresde.times import ClosedTimes, UniformGrid

# One dimension: y = 0.8 x + 0.5 n, so E[x | y] = y / 1.1125 with variance 1 - 0.64 / 0.89.
JOINT = torch.tensor([[1.0, 0.8], [0.8, 0.89]], dtype=torch.float64)
ZERO = torch.zeros(2, 1).double()
LEFT = 1 - 0.64 / 0.89


class Mixed(NoiseLaw):
    """A law of a user: between constant and Brownian."""

    def std(self, w):
        return 0.4 * w**0.75


BRIDGES = [
    *(InDI(Constant(0.5)), InDI(Brownian(0.5)), InDI(Mixed())),
    *(I2SB(), I2SB(0.5, 0.5), InDI()),
]
each_bridge = pytest.mark.parametrize("bridge", BRIDGES, ids=lambda b: str(b).split(" object")[0])


def pairs(bridge, sees=False):
    return GaussianBridge(ZERO, JOINT, bridge, sees)


def plane(bridge, sees=False):
    """Pairs in two dimensions with means, whose axes have nothing in common."""
    a = torch.tensor([[1.0, 0.3], [0.0, 0.7]]).double()
    h = torch.tensor([[0.9, 0.2], [-0.1, 0.5]]).double()
    c = a @ a.T
    joint = torch.cat((torch.cat((c, c @ h.T), 1), torch.cat((h @ c, h @ c @ h.T), 1)))
    joint[2:, 2:] += 0.1 * torch.eye(2)
    return GaussianBridge(torch.tensor([[1.0, 0.0], [2.0, -1.0]]).double(), joint, bridge, sees)


def recursion(bridge, steps, seen):
    """Slope and variance of the result given y, by the coefficients of C.4, one step at a time."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    step = [part.tolist() for part in bridge.step(times[:-1], times[1:])]
    a, b, c = (f(times).tolist() for f in (bridge.alpha, bridge.sigma, bridge.gamma))
    slope, variance = 1.0, c[0] ** 2
    for i, (kept, fresh, tau) in enumerate(zip(*step, strict=True)):
        if seen:
            room = a[i] ** 2 * LEFT + c[i] ** 2
            gain = a[i] * LEFT / room if room else 0.0
            mean = 0.8 / 0.89
            own = fresh * (mean - gain * (b[i] + a[i] * mean))
        else:
            total = a[i] ** 2 + 1.6 * a[i] * b[i] + 0.89 * b[i] ** 2 + c[i] ** 2
            gain, own = (a[i] + 0.8 * b[i]) / total, 0.0
        factor = kept + fresh * gain
        slope, variance = factor * slope + own, factor**2 * variance + tau**2
    return slope, variance


# --- The process ---------------------------------------------------------------------------------


@each_bridge
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.7, 0.65), (0.5, 0.0), (0.3, 1e-3)])
def test_a_step_from_the_true_data_keeps_the_marginal(bridge, t, s):
    t, s = torch.tensor([t, s], dtype=torch.float64)
    kept, fresh, tau = bridge.step(t, s)
    assert float(kept * bridge.sigma(t)) == pytest.approx(float(bridge.sigma(s)), abs=1e-14)
    own = kept * bridge.alpha(t) + fresh
    assert float(own) == pytest.approx(float(bridge.alpha(s)), abs=1e-14)
    noise = (kept * bridge.gamma(t)) ** 2 + tau**2
    assert float(noise) == pytest.approx(float(bridge.gamma(s)) ** 2, abs=1e-14)


@each_bridge
def test_both_ends_are_exact(bridge):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert bridge.alpha(ends).tolist() == [1, 0]
    assert bridge.sigma(ends).tolist() == [0, 1]
    assert float(bridge.gamma(ends)[0]) == 0
    step = bridge.step(ends[1], ends[0])
    assert [float(part) for part in step] == [0, 1, 0]


@each_bridge
def test_stated_rates_are_derivatives(bridge):
    t = torch.linspace(0.03, 0.98, 12, dtype=torch.float64)
    torch.testing.assert_close(bridge.sigma_dot(t), derivative(bridge.sigma, t))
    torch.testing.assert_close(bridge.alpha_dot(t), derivative(bridge.alpha, t))
    half = derivative(lambda s: 0.5 * bridge.gamma(s) ** 2, t)
    torch.testing.assert_close(bridge.gamma_rate(t), half, rtol=1e-7, atol=1e-12)


def test_the_schroedinger_bridge_has_its_published_variances():
    r"""c^2 = s^2 S^2 / (s^2 + S^2), and the posterior's s_s^2 (s_t^2 - s_s^2) / s_t^2."""
    bridge, t = I2SB(0.2, 0.6), torch.linspace(0, 1, 21, dtype=torch.float64)
    fine = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    root = math.sqrt(0.2) + (math.sqrt(0.6) - math.sqrt(0.2)) * torch.minimum(fine, 1 - fine)
    total = torch.cumulative_trapezoid(root**2, fine)
    forward = torch.cat((torch.zeros(1), total))[:: 200_000 // 20].double()
    back = forward[-1] - forward
    torch.testing.assert_close(bridge.gamma(t) ** 2, forward * back / forward[-1])
    torch.testing.assert_close(bridge.sigma(t), forward / forward[-1])
    tau = bridge.step(t[1:], t[:-1]).noise
    posterior = forward[:-1] * (forward[1:] - forward[:-1]) / forward[1:]
    torch.testing.assert_close(tau**2, posterior)


class Rising(NoiseLaw):
    def std(self, w):
        return 0.3 * w**1.5


class Offset(NoiseLaw):
    def std(self, w):
        return 0.1 + 0 * w


@pytest.mark.parametrize(("law", "words"), [(Rising(), "Rising"), (Offset(), "0.1"), (3.0, "3.0")])
def test_an_inconsistent_law_is_refused(law, words):
    with pytest.raises(InputError, match=f"noise.*{words}"):
        InDI(law)


@pytest.mark.parametrize("value", [-0.1, math.inf, True])
def test_scales_of_noise_are_numbers(value):
    with pytest.raises(InputError, match=f"sigma.*{value}"):
        Brownian(value)


def test_the_founding_pair_of_marginal_and_increment_loses_noise():
    r"""nu = sqrt(t) sigma with the increment of t sigma_t, 0: the variance ends at .9, not 1."""

    class Paired(Brownian):
        def added(self, w, v):
            return torch.zeros_like(v)

    def total(bridge):
        slope, variance = recursion(bridge, 1000, False)
        return 0.89 * slope**2 + variance

    assert total(InDI(Brownian(1.0))) == pytest.approx(1, abs=0.01)
    assert total(InDI(Paired(1.0))) < 0.92


# --- The sampler on jointly Gaussian pairs -------------------------------------------------------


@each_bridge
@pytest.mark.parametrize("seen", [False, True], ids=["state", "source"])
def test_the_sampler_is_the_recursion(bridge, seen):
    """The noiseless part to 1e-10, and all of it with the same noise."""
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    model, steps = pairs(bridge, seen), 7
    x = Restore(steps, noise=0.0)(model, source=y, seed=0).x
    torch.testing.assert_close(x, recursion(bridge, steps, seen)[0] * y, rtol=0, atol=1e-10)
    streams = Streams.of(3, batch=5)
    z = streams.normal((1,), Purpose.LATENT, 0, torch.float64)
    state = y + float(bridge.gamma(torch.ones(()).double())) * z
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for i in range(steps):
        kept, fresh, tau = bridge.step(times[i], times[i + 1])
        z = streams.normal((1,), Purpose.DIFFUSION, i, torch.float64)
        state = kept * state + fresh * model.denoise(state, times[i], source=y) + tau * z
    found = Restore(steps)(model, source=y, seed=3)
    torch.testing.assert_close(found.x, state, rtol=0, atol=1e-10)
    assert found.nfe.tolist() == [steps] * 5


@pytest.mark.parametrize("seen", [False, True], ids=["state", "source"])
@pytest.mark.parametrize("bridge", BRIDGES[1:4], ids=["Brownian", "own", "I2SB"])
def test_draws_have_the_variance_of_the_recursion(bridge, seen):
    """Four standard errors of a variance of 20000 draws."""
    n, steps = 20_000, 10
    y = torch.full((n, 1), 1.3, dtype=torch.float64)
    x = Restore(steps)(pairs(bridge, seen), source=y, seed=1).x
    slope, variance = recursion(bridge, steps, seen)
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    assert float(x.mean()) == pytest.approx(1.3 * slope, abs=4 * math.sqrt(variance / n))


@each_bridge
def test_one_step_is_the_mean_given_the_source_bit_for_bit(bridge):
    for model in (pairs(bridge), pairs(bridge, True)):
        y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        z = Streams.of(0, batch=9).normal((1,), Purpose.LATENT, 0, y.dtype)
        start = bridge.start(z, source=y)
        one = Restore(1)(model, source=y, seed=0).x
        assert torch.equal(one, model.denoise(start, torch.ones(()).double(), source=y))
        bare = Restore(1, noise=0.0)(model, source=y, seed=0).x
        if float(bridge.gamma(torch.ones(()))) == 0 or model.sees_source:
            torch.testing.assert_close(bare, y * 0.8 / 0.89, rtol=0, atol=1e-14)


def test_the_deterministic_limit_is_a_map_between_the_laws():
    slope = recursion(InDI(), 10_000, False)[0]
    assert slope == pytest.approx(1.05998, abs=1e-5)
    assert recursion(InDI(), 1000, False)[0] == pytest.approx(math.sqrt(1 / 0.89), rel=2e-4)
    variances = [0.89 * recursion(InDI(), n, False)[0] ** 2 for n in (10, 100, 1000)]
    assert variances == pytest.approx([0.969, 0.9969, 0.9997], abs=3e-4)


def test_given_the_source_the_limit_is_the_posterior():
    found = [recursion(I2SB(0.5, 0.5), n, True)[1] for n in (100, 1000, 10_000)]
    assert found == pytest.approx([0.2614, 0.2778, 0.28048], abs=6e-5)
    slope, variance = recursion(I2SB(0.5, 0.5), 10_000, False)
    assert (slope, variance) == pytest.approx((0.821, 0.3996), abs=6e-4)
    assert recursion(I2SB(0.5, 0.5), 10_000, True)[0] == pytest.approx(0.8 / 0.89, abs=1e-10)


def test_intervals_of_draws_cover_the_truth_as_they_say():
    """90 % intervals of 99 draws for 600 pairs in a plane; given the state alone they do not."""
    n, draws = 600, 99
    for seen in (True, False):
        model = plane(InDI(Brownian(0.5)), seen)
        x, y = model.sample(n, seed=4)
        many = y.repeat_interleave(draws, 0)
        found = Restore(120)(model, source=many, seed=5).x.unflatten(0, (n, draws))
        low, high = (found.kthvalue(k, 1).values for k in (5, 95))  # a rank is uniform on 1 to 100
        share = float(((x > low) & (x < high)).double().mean())
        assert share == pytest.approx(0.9, abs=0.03) if seen else share > 0.93
        mean, covariance = model.posterior(y)
        off = (found.mean(1) - mean).square().mean(0).sqrt() / covariance.diagonal().sqrt()
        assert bool((off < 0.15).all() if seen else (off > 0.2).any())


def test_the_posterior_of_pairs_is_that_of_their_draws():
    model = plane(InDI())
    x, y = model.sample(50_000, seed=0)
    mean, covariance = model.posterior(y)
    left = x - mean
    cross = (left.T @ (y - y.mean(0))) / len(x)
    assert float(cross.abs().max()) < 5 / math.sqrt(len(x))
    torch.testing.assert_close(left.T @ left / len(x), covariance, rtol=0, atol=0.02)


@each_bridge
def test_the_exact_model_carries_the_law_along(bridge):
    """Continuity: the mean moves by E[u], the covariance by cov(u, x) and its transpose."""
    model, t = plane(bridge), torch.tensor(0.37, dtype=torch.float64)
    c = model.covariance

    def law(s):
        a, b, g = bridge.alpha(s), bridge.sigma(s), bridge.gamma(s)
        both = a**2 * c[:2, :2] + a * b * (c[:2, 2:] + c[2:, :2]) + b**2 * c[2:, 2:]
        return a * model.mean[0] + b * model.mean[1], both + g**2 * torch.eye(2)

    mean, now = law(t)
    rates = [torch.func.jacfwd(lambda s, i=i: law(s)[i])(t) for i in (0, 1)]
    torch.testing.assert_close(model.velocity(mean[None], t)[0], rates[0])
    jacobian = torch.func.jacfwd(lambda x: model.velocity(x[None], t)[0])(mean)
    torch.testing.assert_close(jacobian @ now + (jacobian @ now).T, rates[1])
    slope = torch.func.jacfwd(lambda x: model.score(x[None], t)[0])(mean)
    torch.testing.assert_close(slope, -torch.linalg.inv(now))


# --- Models --------------------------------------------------------------------------------------


def learned(bridge, output=None, sees=True, seed=0):
    torch.manual_seed(seed)
    network = MLP(2, width=16, depth=1, conditions={"source": 2} if sees else None).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return BridgeModel(network, bridge, output)


@each_bridge
def test_the_velocity_of_a_network_is_that_of_its_denoised_estimate(bridge):
    """With the exact estimate given the source it is the exact velocity given the source."""
    exact, t = plane(bridge, True), torch.tensor([0.2, 0.6, 0.999]).double()
    x, y = exact.sample(3, seed=0)
    state = bridge.interpolate(x, y, t, torch.ones_like(x))

    class Told(torch.nn.Module):
        def forward(self, x, c, source):
            return exact.denoise(x, c / 4, source=source)

    model = BridgeModel(Told(), bridge, DataOutput())
    assert model.sees_source
    found, right = (m.velocity(state, t, source=y) for m in (model, exact))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_without_the_source_only_noise_that_is_never_added_has_a_velocity():
    x = torch.ones(2, 2).double()
    with pytest.raises(InputError, match=r"velocity.*Brownian"):
        learned(InDI(Brownian(0.1)), sees=False).velocity(x, 0.5, source=x)
    for law in (Constant(), Constant(0.3)):
        model = learned(InDI(law), sees=False)
        u = model.velocity(x, 0.5, source=x)
        torch.testing.assert_close(u, (x - model.denoise(x, 0.5, source=x)) / 0.5)


@pytest.mark.parametrize("output", [DataOutput(), ResidualOutput()])
def test_deterministic_restoration_is_euler_on_rectified_flow(output):
    """The same network, and noise for a source: equal to 1e-12."""
    model = learned(InDI(), output, sees=False)
    torch.manual_seed(0)
    y = torch.randn(6, 2).double()

    class Same(torch.nn.Module):
        def forward(self, x, c):
            return model.denoise(x, c, source=x)

    flow = ScoreModel(Same(), RectifiedFlow(), DataParametrisation(None), ScaledTime(1.0))
    restored = Restore(8, noise=0.0, eps=0.1)(model, source=y, seed=0).x
    euler = Euler(8, UniformGrid(), eps=0.1)(flow, latent=y).x
    torch.testing.assert_close(restored, euler, rtol=0, atol=1e-12)


def test_the_flow_of_a_bridge_is_the_limit_of_its_deterministic_steps():
    model = plane(InDI())
    _, y = model.sample(4, seed=0)
    flow = ProbabilityFlow(eps=1e-4, rtol=1e-8, atol=1e-8)(model, (4, 2), seed=0, source=y).x
    errors = [
        float((Restore(n, noise=0.0, eps=1e-4)(model, source=y, seed=0).x - flow).abs().max())
        for n in (50, 100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_a_model_is_described_and_built_again(tmp_path):
    model = learned(InDI(Brownian(0.2)), DataOutput()).float()
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    made = fit(
        *(model, (x, {"source": 0.5 * x})),
        steps=3,
        loss=Paired(),
        folder=tmp_path / "run",
        progress=False,
    )
    again = load(tmp_path / "run").model
    assert (again.process, again.output) == (model.process, DataOutput())
    one, two = (Restore(3)(m, source=x, seed=0).x for m in (made, again))
    assert torch.equal(one, two)


def test_float32_agrees_with_float64():
    model = learned(InDI(Brownian(0.2)))
    y = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    wide = Restore(30)(model, source=y, seed=0).x
    narrow = Restore(30)(model.float(), source=y.float(), seed=0).x
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-4)
    t = torch.tensor([0.0, 1e-7, 1e-3, 1.0])
    assert bool(model.denoise(y[:4].float(), t, source=y[:4].float()).isfinite().all())


def test_an_example_is_the_same_alone_and_in_a_batch():
    model = learned(InDI(Brownian(0.2)))
    y = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    whole = Restore(4)(model, source=y, seed=0).x
    alone = Restore(4)(model, source=y[3:4], seed=0, seeds=[3]).x
    torch.testing.assert_close(whole[3:4], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m, y: Restore(4)(m, seed=0), "source=y"),
        (lambda m, y: Restore(4)(m, seed=0, source=[1.0]), "source must be a tensor.*list"),
        (lambda m, y: Restore(4)(GaussianModel(ZERO, 1.0, VPSDE()), source=y), "Bridge.*VPSDE"),
        (lambda m, y: Restore(4)(m, (3, 2), seed=0, source=y[:, :1]), r"source.*\(5, 1\)"),
        (lambda m, y: Restore(4, noise=2.0), "noise.*2.0"),
        (lambda m, y: Restore(0), "steps.*0"),
        (lambda m, y: Restore(4, grid=3), "grid.*3"),
        (lambda m, y: Restore(4)(flow_model(), (5, 2), source=y), "RectifiedFlow"),
        (lambda m, y: UniPC(4)(m, (5, 2), source=y), "ScoreFunction"),
        (lambda m, y: BridgeModel(m.network, VPSDE()), "process.*VPSDE"),
        (lambda m, y: Paired()(m, y), "source.*None"),
        (lambda m, y: Paired()(flow_model(), y, source=y), "RectifiedFlow"),
        (lambda m, y: Paired(BridgeVelocityWeighting(), eps=0.0)(m, y, source=y), "eps.*0.0"),
        (lambda m, y: Paired(weighting=1.0), "weighting.*1.0"),
        (lambda m, y: ClosedTimes(1.0), "share.*1.0"),
        (lambda m, y: GaussianBridge(ZERO, torch.eye(3), InDI()), r"covariance.*\(3, 3\)"),
        (lambda m, y: GaussianBridge(ZERO, torch.ones(2, 2), InDI()), "covariance"),
        (lambda m, y: GaussianBridge(ZERO, JOINT, 3), "process.*int"),
        (lambda m, y: I2SB(beta_min=0.0), "beta_min.*0.0"),
    ],
)
def test_misuse_is_a_sentence(act, words):
    with pytest.raises(InputError, match=words):
        act(learned(InDI()), torch.zeros(5, 2).double())


def flow_model():
    return ScoreModel(lambda x, c: x, RectifiedFlow(), DataParametrisation())


# --- The loss ------------------------------------------------------------------------------------


@each_bridge
def test_the_loss_of_the_exact_model_is_the_variance_left(bridge):
    """At t = 1 it is that of E[x | y] with the start's noise; five standard errors."""
    for seen in (False, True):
        model, t = pairs(bridge, seen), torch.tensor(0.6, dtype=torch.float64)
        x, y = model.sample(20_000, seed=0)
        value = Paired()(model, x, t, seed=1, source=y)
        a, b, c = (float(f(t)) for f in (bridge.alpha, bridge.sigma, bridge.gamma))
        if seen:
            room = a**2 * LEFT + c**2
            left = LEFT - (a * LEFT) ** 2 / room
        else:
            left = 1 - (a + 0.8 * b) ** 2 / (a**2 + 1.6 * a * b + 0.89 * b**2 + c**2)
        error = float(value.std()) / math.sqrt(len(x))
        assert float(value.mean()) == pytest.approx(left, abs=5 * error + 1e-14)


def test_a_tenth_of_the_times_is_the_end():
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    t = ClosedTimes(0.1).quantile(u, InDI(), 1e-3)
    assert float((t == 1).double().mean()) == pytest.approx(0.1, abs=1e-4)
    assert float(t.min()) == pytest.approx(1e-3, abs=2e-4)
    inside = t[t < 1]
    assert float(inside.mean()) == pytest.approx(0.5005, abs=1e-3)


def test_the_velocity_weight_is_the_error_of_the_velocity():
    model = learned(InDI(Constant(0.3)), sees=False)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    y, t = 0.5 * x + 1, torch.linspace(0.1, 1, 6, dtype=torch.float64)
    noise = torch.ones_like(x)
    value = Paired(BridgeVelocityWeighting())(model, x, t, noise, source=y)
    state = model.process.interpolate(x, y, t, noise)
    u = model.velocity(state, t, source=y)
    torch.testing.assert_close(value, (u - (y + 0.3 * noise - x)).square().mean(1))
    plain = Paired(DataWeighting())(model, x, t, noise, source=y)
    torch.testing.assert_close(value, plain / t**2)
