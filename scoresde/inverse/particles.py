r"""Sequential Monte Carlo: weighted samples that correct for the errors of a proposal.

Particles follow the reverse chain by a guided proposal. Their weights correct for the difference
between the proposal and the target. With the chain :math:`K(x_s \mid x_t)` of the model, the
proposal :math:`q` and a *twist* :math:`\psi_t > 0` that guesses :math:`p(y \mid x_t)`,

.. math:: w_1 = \psi_1(x_1), \qquad
          w_s = w_t \, \frac{\psi_s(x_s) \, K(x_s \mid x_t)}{\psi_t(x_t) \, q(x_s \mid x_t)},
          \qquad \psi_0 = p(y \mid x_0) .

The mean weight is an unbiased estimate of :math:`p(y)` under the chain for every twist and every
proposal; a poor choice only increases the variance. If the effective sample size falls below a
given fraction of the particles, they are resampled systematically.

**Tilted law.** Classifier-free guidance does not sample a known density. With the mean
:math:`m_u + w (m_c - m_u)` as the proposal and the weights

.. math:: \log w_s = \log w_t + \tfrac12 w (w - 1) \frac{\lVert m_c - m_u \rVert^2}{v}

(the normaliser of :math:`N(m_u, v)^{1 - w} N(m_c, v)^w`) the particles sample the tilted law
:math:`p_u^{1 - w} p_c^w / Z`, and the mean weight estimates :math:`Z`, with no more network
evaluations than guidance.

**The chain.** :class:`IsotropicKernel` is :math:`q(x_s \mid x_t, x_0 = D)`, as in DDPM. It omits
the variance of :math:`x_0` about D, and its law has a bias of O(1 / steps).
:class:`CovarianceKernel` adds this variance, for one product with the Jacobian per dimension.

References:
    Wu et al., *Practical and asymptotically exact conditional sampling in diffusion models*, 2023,
    https://arxiv.org/abs/2306.17775 (algorithm 1).
    Del Moral, Doucet, Jasra, *Sequential Monte Carlo samplers*, 2006 (section 3).
    Douc, Cappé, Moulines, *Comparison of resampling schemes for particle filtering*, 2005.

*Check:* ``tests/test_particles.py``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.guidance import ClassifierFreeGuidance
from scoresde.inverse.kernels import CovarianceKernel, IsotropicKernel, Kernel
from scoresde.inverse.posterior import Posterior, require_noise, with_signal
from scoresde.model import ScoreFunction, evaluating
from scoresde.operators import Linearised
from scoresde.passes import count_products, counting, owned_by
from scoresde.progress import Progress
from scoresde.sde import SDE
from scoresde.shapes import expand, sum_features
from scoresde.streams import Purpose, Streams
from scoresde.times import Grid, LogSNRGrid

_DENSE = 64  # measurements up to which a twist has the full covariance
_SMALL = 16  # dimensions of an example up to which the chain has the covariance

Rows = dict[str, Tensor]  # each with one row per particle


@dataclass(frozen=True)
class Particles:
    """Weighted samples: K particles of each of B populations; a single one has no axis B.

    Arguments:
        seed: Seed of the random streams.
        x: Particles in model units, with shape ``(K, *)`` or ``(B, K, *)``.
        log_weights: Logarithms of their normalised weights, ``(K,)`` or ``(B, K)``.
        ess: Effective sample size at each node of the grid, before resampling, and at the end:
            ``(steps + 2,)`` or ``(B, steps + 2)``.
        log_evidence: Logarithm of the estimate of p(y), or of Z, in nats, ``()`` or ``(B,)``.
        standard_error: Standard error of ``log_evidence``, from the independent groups.
        nfe: Number of network evaluations of each particle, int64, with the shape of
            ``log_weights``.
        vjps: Number of products with a transposed Jacobian of each particle, likewise.
    """

    seed: int
    x: Tensor
    log_weights: Tensor
    ess: Tensor
    log_evidence: Tensor
    standard_error: Tensor
    nfe: Tensor
    vjps: Tensor

    def resampled(self, count: int, seed: int | None = None) -> Tensor:
        """Draws examples of equal weight from a single population, ``(count, *)``."""
        if self.log_weights.ndim != 1:
            raise InputError(
                "log_weights must have shape (particles,), one population, got "
                f"{tuple(self.log_weights.shape)}; resample each population separately."
            )
        streams = Streams.of(seed, batch=1, device=self.x.device)
        u = streams.uniform((), Purpose.RESAMPLING, dtype=torch.float64)
        return self.x[systematic(self.log_weights[None], u, check_count("count", count))[0]]


def systematic(log_weights: Tensor, u: Tensor, count: int) -> Tensor:
    """Returns the indices of the parents by systematic resampling, int64 ``(P, count)``.

    Each particle has its expected number of offspring, rounded up or down.

    Arguments:
        log_weights: Logarithms of weights, not necessarily normalised, with shape ``(P, M)``.
        u: Numbers in (0, 1), one for each row, with shape ``(P,)``.
        count: Number of offspring, positive.
    """
    edges = torch.softmax(log_weights.double(), 1).cumsum(1)
    points = (torch.arange(count, device=u.device) + u[:, None].double()) / count
    return torch.searchsorted(edges, points).clamp(max=log_weights.shape[1] - 1)


class Target(ABC):
    """Base class for target laws of the particles: proposals and weights for one kind of model.

    Arguments:
        kernel: Covariance of the steps of the chain.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @abstractmethod
    def at(self, model: ScoreFunction, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Rows:
        """Evaluates the model at states ``(B, *)``; the results include ``log_twist``."""

    @abstractmethod
    def step(
        self, local: Rows, base: Tensor, gain: Tensor, std: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Takes a step of the proposal from a time t to an earlier time s.

        Arguments:
            local: Result of :meth:`at`.
            base: The term of the state in the mean of :math:`q(x_s \mid x_t, x_0)`, ``(B, *)``.
            gain: Factor of :math:`x_0` in this mean.
            std: Standard deviation of :math:`q(x_s \mid x_t, x_0)`.
            z: Standard normal noise, with shape ``(B, *)``.

        Returns:
            The new states ``(B, *)``, and the logarithm of the factor by which the step multiplies
            the weights, apart from the twists, ``(B,)``.
        """

    @abstractmethod
    def end(self, model: ScoreFunction, local: Rows, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns clean examples and the logarithm of the twist there, ``(B,)``."""


class _Posterior(Target):
    """The posterior of an observation, with the proposal of a posterior model."""

    def at(self, model: ScoreFunction, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Rows:
        assert isinstance(model, Posterior)
        local = model.at(x, t, **cond)
        near, data = local.near, local.mean
        shift = local.covariance(near.pull(model.weights(local)))
        measured = model.observed.operator.measured(near.residual)
        return {
            "data": data,
            "shift": shift,
            "log_twist": log_twist(near, measured, lambda u: local.covariance(near.pull(u))),
            **self.kernel.moments("covariance", data, local.covariance),
        }

    def step(
        self, local: Rows, base: Tensor, gain: Tensor, std: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        spread = self.kernel.spread(local.get("covariance"), gain, std)
        shift = gain * local["shift"]
        x = base + gain * local["data"] + shift + spread.color(z)
        d = spread.whiten(shift)
        return x, -sum_features(z * d + 0.5 * d**2)

    def end(self, model: ScoreFunction, local: Rows, z: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Posterior)
        one, zero = torch.ones((), dtype=z.dtype), torch.zeros((), dtype=z.dtype)
        x = local["data"]
        if "covariance" in local:
            x = x + self.kernel.spread(local["covariance"], one, zero).color(z)
        return x, model.observed.log_prob(x)


class _Tilted(Target):
    """The tilted law of classifier-free guidance."""

    def at(self, model: ScoreFunction, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Rows:
        assert isinstance(model, ClassifierFreeGuidance)
        x, t = with_signal(model.sde, x, t)
        with torch.set_grad_enabled(self.kernel.differentiates):
            leaf = x.detach().requires_grad_(torch.is_grad_enabled())
            strong, weak, weight = model.pair("denoise", leaf, t, cond)
        gain = model.sde.sigma(t) ** 2 / model.sde.alpha(t)
        return {
            "strong": strong.detach(),
            "weak": weak.detach(),
            "weight": weight.to(x).expand(len(x)),
            "log_twist": x.new_zeros(len(x)),
            **self.kernel.moments("of_strong", strong, product(strong, leaf, gain)),
            **self.kernel.moments("of_weak", weak, product(weak, leaf, gain)),
        }

    def step(
        self, local: Rows, base: Tensor, gain: Tensor, std: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        weak, change = base + gain * local["weak"], gain * (local["strong"] - local["weak"])
        w = local["weight"]
        covariances = local.get("of_weak"), local.get("of_strong")
        return self.kernel.tilt(weak, change, w, covariances, gain, std, z)

    def end(self, model: ScoreFunction, local: Rows, z: Tensor) -> tuple[Tensor, Tensor]:
        one, small = torch.ones((), dtype=z.dtype), torch.full((), 1e-6, dtype=z.dtype)
        if "of_weak" not in local:
            w = expand(local["weight"], z)
            return torch.lerp(local["weak"], local["strong"], w), z.new_zeros(len(z))
        return self.step(local, torch.zeros_like(z), one, small, z)


def log_twist(near: Linearised, measured: Tensor, spread: Any) -> Tensor:
    r"""Returns :math:`\log N(y; A D, A \, \mathrm{Cov} A^T + \Sigma)`, ``(B,)``.

    For more than 64 measurements the covariance is approximated by a diagonal matrix of its row
    sums. The twist is then worse, but the weights remain correct.

    Arguments:
        near: The observation, linearised at D.
        measured: Mask of the measured entries of y, bool with the shape of the residual.
        spread: :math:`u \mapsto \mathrm{Cov} A^T u`.
    """
    r, known = near.residual.flatten(1), measured.expand(near.residual.shape).flatten(1)
    noise = near.variance.expand(near.residual.shape).flatten(1)
    count = r.shape[1]
    if count > _DENSE:
        ones = torch.where(measured, 1.0, 0.0).to(near.residual)
        sums = near.push(spread(ones)).flatten(1).clamp(min=0)
        v = sums + noise
        log_normal = -0.5 * (r**2 / v + torch.log(2 * math.pi * v))
        return torch.where(known, log_normal, 0).sum(1)
    matrix = _matrix(near, spread, count)
    both = known[:, :, None] & known[:, None, :]
    # Relative to the noise; a network's Jacobian may have negative eigenvalues, which count as 0.
    scale = noise.sqrt()
    relative = torch.where(both, matrix, 0) / (scale[:, :, None] * scale[:, None, :])
    values, basis = torch.linalg.eigh(0.5 * (relative + relative.mT))
    v = 1 + values.clamp(min=0)
    white = (basis.mT @ torch.where(known, r / scale, 0).unsqueeze(2)).squeeze(2)
    constant = torch.where(known, torch.log(2 * math.pi * noise), 0).sum(1)
    return -0.5 * ((white**2 / v + torch.log(v)).sum(1) + constant)


def _matrix(near: Linearised, spread: Any, count: int) -> Tensor:
    """Returns A Cov A^T, with shape ``(B, m, m)``, by a product for each measurement."""
    r = near.residual
    units = torch.eye(count, dtype=r.dtype, device=r.device).reshape(count, 1, *r.shape[1:])
    return torch.stack([near.push(spread(u.expand_as(r))).flatten(1) for u in units], 2)


def product(output: Tensor, leaf: Tensor, gain: Tensor) -> Any:
    r"""Returns the product with :math:`(\sigma^2 / \alpha) J^T` of an output of the model."""

    def covariance(v: Tensor) -> Tensor:
        count_products(len(v))
        (found,) = torch.autograd.grad(output, leaf, v, retain_graph=True)
        return expand(gain, found) * found

    return covariance


@dataclass(frozen=True)
class Twisted:
    r"""Twisted particles: weighted samples of a posterior, or of a tilted law.

    For a posterior model such as :class:`~scoresde.inverse.MMPS` the weighted samples converge to
    the exact posterior as the numbers of particles and steps grow. For
    :class:`~scoresde.guidance.ClassifierFreeGuidance` they converge to the tilted law.
    (:mod:`scoresde.inverse.particles` describes the method.) The effective sample size falls
    exponentially with the dimension of the measurement, so check ``ess``.

    Arguments:
        particles: Number of particles K for each observation, positive.
        steps: Number of steps, positive.
        grid: Spacing of the times; uniform in the log-SNR by default.
        groups: Number of independent groups of particles, a divisor of ``particles``. Their spread
            gives the standard error of the evidence.
        threshold: Fraction of a group, in [0, 1]. A group is resampled if its effective sample
            size falls below it.
        kernel: Covariance of the steps of the chain. If None, :class:`CovarianceKernel` for
            examples of at most 16 dimensions, otherwise :class:`IsotropicKernel`.
        eps: Time of the last state with noise. If None, the sampling cut-off of the process.
        batch_size: Number of particles per network call, positive. If None, all.

    Raises:
        InputError: If a number is out of range; when applied, if the model is neither a posterior
            with noise nor classifier-free guidance at all noise levels.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> from scoresde.inverse import MMPS, Masking, Observation
        >>> prior = GaussianModel(torch.zeros(1), 1.0, VPSDE())
        >>> seen = Observation(Masking(torch.tensor([True])), torch.tensor([1.0]), std=0.5)
        >>> run = Twisted(particles=64, steps=50)(MMPS(prior, seen), seed=0)
        >>> run.x.shape, run.log_evidence.shape
        (torch.Size([64, 1]), torch.Size([]))
    """

    particles: int = 512
    steps: int = 200
    grid: Grid = field(default_factory=LogSNRGrid)
    groups: int = 8
    threshold: float = 0.5
    kernel: Kernel | None = None
    eps: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("particles", "steps", "groups"):
            check_count(name, getattr(self, name))
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.particles % self.groups:
            raise InputError(
                f"particles must be a multiple of groups={self.groups}, got {self.particles}; use "
                f"{-(-self.particles // self.groups) * self.groups}."
            )
        if not 0 <= self.threshold <= 1:
            raise InputError(
                f"threshold must be in [0, 1], got {self.threshold}; a typical value is 0.5."
            )

    @torch.no_grad()
    def __call__(
        self,
        model: ScoreFunction,
        shape: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        progress: bool = False,
        **cond: Any,
    ) -> Particles:
        """Draws the particles of each observation, or of each row of the conditions.

        Arguments:
            model: A posterior with noise, or classifier-free guidance without an interval.
            shape: Shape of one example. If None, the model's.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: Index of each population's streams; ``range(B)`` by default.
            progress: Whether to show the progress (see :mod:`scoresde.progress`).
            **cond: Conditions, each with shape ``(B, *)``; a class may be a number.

        Raises:
            InputError: If the arguments are inconsistent with each other or the model.
        """
        example = _shape_of(model, shape)
        told = {k: torch.tensor([v]) if isinstance(v, int) else v for k, v in cond.items()}
        count, alone = _populations(model, example, told)
        simulation = _Simulation(
            self, model, example, Streams.of(seed, seeds, count, model.device), told
        )
        with counting(count * self.particles, model.device) as passes, evaluating(model, True):
            x, log_weights, ess, evidence = simulation.run(progress)
        log_evidence, error = _mean_of_groups(evidence)
        nfe, vjps = (n.reshape(count, -1) for n in (passes.network, passes.products))
        found = (x, log_weights, ess, log_evidence, error, nfe, vjps)
        parts = [part[0] if alone else part for part in found]
        return Particles(simulation.seed, *parts)


class _Simulation:
    """The particles of all populations, in rows: (population, group, slot)."""

    def __init__(
        self,
        plan: Twisted,
        model: ScoreFunction,
        shape: tuple[int, ...],
        streams: Streams,
        cond: dict[str, Tensor],
    ) -> None:
        self.plan, self.model, self.shape = plan, model, shape
        self.seed, self.count = streams.seed, len(streams)
        self.size = plan.particles // plan.groups
        population = torch.arange(self.count, device=model.device)
        self.population = population.repeat_interleave(plan.particles)
        index = streams.indices[:, None]
        slots, groups = (
            index * n + torch.arange(n, device=index.device) for n in (plan.particles, plan.groups)
        )
        # Offspring are in different slots from their parent, so their noise differs.
        self.slots = Streams(streams.seed, slots.flatten())
        self.groups = Streams(streams.seed, groups.flatten())
        self.cond = {k: v.to(model.device)[self.population % len(v)] for k, v in cond.items()}
        self.target = _target(plan, model, shape)

    def run(self, progress: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns particles, weights, sample sizes, evidence, ``(B, K, *)`` to ``(B, groups)``."""
        sde = self.model.sde
        eps = sde.check_eps(sde.cutoffs.sampling if self.plan.eps is None else self.plan.eps)
        times = self.plan.grid(self.plan.steps, sde, eps).cpu()
        dtype = self.model.state(torch.empty(0)).dtype
        noise = self.slots.normal(self.shape, Purpose.LATENT, dtype=dtype)
        x = sde.start(noise)
        local = self._evaluate(x, times[0])
        weights, total = local["log_twist"].double(), x.new_zeros(len(self.groups)).double()
        sizes = []
        with Progress(len(times) - 1, "particles", "step", shown=progress) as bar:
            for i, (t, s) in enumerate(pairwise(times)):
                sizes.append(self._size(weights, total))
                x, local, weights, total = self._resample(x, local, weights, total, i)
                base, gain, std = _coefficients(sde, x, t, s)
                z = self.slots.normal(self.shape, Purpose.DIFFUSION, i, dtype)
                x, ratio = self.target.step(local, base, gain, std, z)
                after = self._evaluate(x, s)
                change = ratio + after["log_twist"] - local["log_twist"]
                weights, local = weights + change, after
                bar.update()
        sizes.append(self._size(weights, total))
        z = self.slots.normal(self.shape, Purpose.FIRST_STEP, dtype=dtype)
        model = cast(ScoreFunction, self.model.take(self.population))
        x, last = self.target.end(model, local, z)
        weights = weights + last - local["log_twist"]
        sizes.append(self._size(weights, total))
        each = self._grouped(weights)
        evidence = total + torch.logsumexp(each, 1) - math.log(self.size)
        joint = self._joint(weights, total)
        return (
            x.reshape(self.count, -1, *self.shape),
            torch.log_softmax(joint, 1),
            torch.stack(sizes, 1),
            evidence.reshape(self.count, -1),
        )

    def _evaluate(self, x: Tensor, t: Tensor) -> Rows:
        """Evaluates the model at all particles, in batches."""
        parts = [
            self._evaluate_some(x, t, rows)
            for rows in torch.arange(len(x), device=x.device).split(self.plan.batch_size or len(x))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _evaluate_some(self, x: Tensor, t: Tensor, rows: Tensor) -> Rows:
        model = cast(ScoreFunction, self.model.take(self.population[rows]))
        cond = {name: values[rows] for name, values in self.cond.items()}
        with owned_by(rows):
            return self.target.at(model, x[rows], t, cond)

    def _grouped(self, weights: Tensor) -> Tensor:
        return weights.reshape(-1, self.size)

    def _joint(self, weights: Tensor, total: Tensor) -> Tensor:
        """Returns the logarithms of the weights in a population, ``(B, K)``."""
        return (self._grouped(weights) + total[:, None]).reshape(self.count, -1)

    def _size(self, weights: Tensor, total: Tensor) -> Tensor:
        """Returns the effective sample size of each population, ``(B,)``."""
        return _effective(self._joint(weights, total))

    def _resample(
        self, x: Tensor, local: Rows, weights: Tensor, total: Tensor, i: int
    ) -> tuple[Tensor, Rows, Tensor, Tensor]:
        """Resamples the groups with too small a sample size; the others keep their particles."""
        each = self._grouped(weights)
        poor = _effective(each) < self.plan.threshold * self.size
        u = self.groups.uniform((), Purpose.RESAMPLING, i, torch.float64)
        own = torch.arange(self.size, device=x.device).expand_as(each)
        parents = torch.where(poor[:, None], systematic(each, u, self.size), own)
        first = self.size * torch.arange(len(each), device=x.device)[:, None]
        rows = (first + parents).flatten()
        mean = torch.logsumexp(each, 1) - math.log(self.size)
        total = total + torch.where(poor, mean, 0)
        weights = torch.where(poor[:, None], 0, each).flatten()
        return x[rows], {k: v[rows] for k, v in local.items()}, weights, total


def _coefficients(sde: SDE, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the linear part of the mean of q(x_s | x_t, x_0), the factor of x_0, and the std."""
    base, std = sde.posterior(x, torch.zeros_like(x), t, s)
    one = torch.ones((1, 1), dtype=torch.float64)
    gain, _ = sde.posterior(torch.zeros_like(one), one, t, s)
    return base, gain[0, 0].to(x), std


def _effective(log_weights: Tensor) -> Tensor:
    """Returns the effective sample size 1 / sum w^2 of rows of weights, ``(P, M)`` to ``(P,)``."""
    return torch.softmax(log_weights, 1).square().sum(1).reciprocal()


def _mean_of_groups(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log of the mean of the estimates ``(B, G)``, and its standard error."""
    groups = evidence.shape[1]
    mean = torch.logsumexp(evidence, 1) - math.log(groups)
    relative = torch.exp(evidence - mean[:, None])
    spread = relative.std(1) if groups > 1 else torch.full_like(mean, torch.nan)
    return mean, spread / math.sqrt(groups)


def _target(plan: Twisted, model: ScoreFunction, shape: Sequence[int]) -> Target:
    kernel = plan.kernel
    if kernel is None:
        kernel = CovarianceKernel() if math.prod(shape) <= _SMALL else IsotropicKernel()
    if isinstance(model, Posterior):
        require_noise(model.observed, "Twisted")
        return _Posterior(kernel)
    if isinstance(model, ClassifierFreeGuidance) and model.interval is None:
        return _Tilted(kernel)
    guided = isinstance(model, ClassifierFreeGuidance)
    limit = f" with interval={model.interval}" if guided else ""
    raise InputError(
        "model must be a posterior such as MMPS(model, observed), or a ClassifierFreeGuidance "
        f"with interval=None, got {type(model).__name__}{limit}."
    )


def _shape_of(model: ScoreFunction, shape: Sequence[int] | None) -> tuple[int, ...]:
    known = model.shape if shape is None else shape
    if not known:
        raise InputError(
            f"shape must be the shape of one example, got {shape}; pass shape=, which is required "
            "for a network without the attribute shape."
        )
    return tuple(known)


def _populations(
    model: ScoreFunction, shape: Sequence[int], cond: dict[str, Tensor]
) -> tuple[int, bool]:
    """Returns the number B of observations or condition rows, and whether it is a single one."""
    sizes = {len(values) for values in cond.values()}
    if isinstance(model, Posterior):
        sizes.add(model.observed.count(shape))
    several = sizes - {1}
    if len(several) > 1:
        raise InputError(
            f"y and the conditions must have the same number of rows, got {sorted(several)}."
        )
    return (several.pop(), False) if several else (1, True)
