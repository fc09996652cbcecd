r"""Samplers with step rules that make samples consistent with an observation.

A posterior model (:mod:`scoresde.inverse.posterior`) changes the denoised estimate, and works with
any sampler. The methods here change the *state* instead: they project it, overwrite a part of it
or move it along a gradient after a step. So each is a separate sampler. None of them samples the
exact posterior with a finite number of steps; each docstring describes what it samples instead.

For Gaussian data :math:`N(0, C)` with :math:`C = [[1, .8], [.8, 1]]` and the first entry observed
as 1 without noise, the second has the mean .8 and the variance .36. On VP with uniform steps:

=======================================  ==========  ==========
mean, variance                           100 steps   1000 steps
=======================================  ==========  ==========
``DDNM``                                 .746, .361  .784, .361
``DDNM(eta=0.85)``                       .737, .284  .787, .276
``Replacement(resamplings=1)``           .490, .457  .499, .490
``Replacement(resamplings=5, jump=1)``   .728, .316  .734, .375
``Replacement(resamplings=20, jump=1)``  .781, .258  .785, .347
=======================================  ==========  ==========

*Check:* ``tests/test_step_rules.py``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.guidance.base import Around
from scoresde.inverse.posterior import check_observation
from scoresde.model import Conditioned, Model, ScoreFunction
from scoresde.operators import Observation
from scoresde.passes import count_products
from scoresde.sample import DDIM, GridSampler, Samples
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler, Step
from scoresde.sample.predictors import AncestralPredictor, Interval
from scoresde.sde import SDE
from scoresde.shapes import check_data, expand, sum_features
from scoresde.streams import Purpose, Streams
from scoresde.times import Grid, LogSNRGrid


class Observed(Around):
    """A model together with an observation of each example of its batch.

    Arguments:
        model: A score function.
        observed: The observation.
    """

    def __init__(self, model: ScoreFunction, observed: Observation) -> None:
        super().__init__(model)
        self.observed = check_observation(observed).to(model.device)

    def take(self, rows: Tensor) -> "Observed":
        return Observed(cast(ScoreFunction, self.model.take(rows)), self.observed.take(rows))

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.model.score(x, t, **cond)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.model.noise(x, t, **cond)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.model.denoise(x, t, **cond)


@dataclass(frozen=True)
class StepRule(GridSampler):
    """Base class for samplers with a step rule for an observation.

    A call takes the argument ``observed``, an :class:`~scoresde.operators.Observation` of the
    batch; other arguments are as for :class:`~scoresde.sample.Sampler`.

    Arguments:
        steps: Number of steps, positive.
        grid: Spacing of the times.
    """

    def __call__(  # type: ignore[override]
        self,
        model: Model,
        shape: Sequence[int] | None = None,
        *,
        observed: Observation,
        **given: Any,
    ) -> Samples:
        """Draws samples that are consistent with an observation.

        Arguments:
            model: A score function.
            shape: The shape ``(B, *)`` of the samples.
            observed: Observation of each sample.
            **given: Other arguments of a sampler, and conditions.

        Raises:
            InputError: If the arguments are inconsistent with each other or the model.
        """
        bound = Observed(cast(ScoreFunction, model), observed)
        example = shape if shape is not None else given.get("latent", torch.empty(0)).shape
        if len(example) > 1:
            self.check_observation(observed, tuple(example)[1:])
        return super().__call__(bound, shape, **given)

    def check_observation(self, observed: Observation, shape: Sequence[int]) -> None:
        """Checks that the rule supports an observation.

        Raises:
            InputError: If the rule does not support it.
        """
        observed.check(shape)


@dataclass(frozen=True)
class ProjectedSampler(StepRule):
    """Base class for rules that use a pseudo-inverse and assume exact measurements."""

    def check_observation(self, observed: Observation, shape: Sequence[int]) -> None:
        super().check_observation(observed, shape)
        if bool((torch.as_tensor(observed.std) > 0).any()):
            raise InputError(
                f"std must be 0 for {type(self).__name__}, which assumes exact measurements, got "
                f"{observed.std}; use MMPS or PiGDM, or std=0."
            )
        # Also rejects operators without a pseudo-inverse, before the first evaluation.
        z = torch.zeros(1, *shape, dtype=observed.y.dtype, device=observed.y.device)
        observed.take(torch.zeros(1, dtype=torch.int64)).project(z)


@dataclass(frozen=True)
class DDNM(ProjectedSampler):
    r"""Denoising diffusion null-space models (DDNM), which project the denoised estimate.

    .. math:: \hat D = D + A^+ (y - A D), \qquad
              x_s = \alpha_s \hat D + \sigma_s (\sqrt{1 - \eta^2} \, \hat z + \eta z)

    with the network's own :math:`\hat z`, not that of the projected estimate, and
    :math:`x_0 = \hat D` at the end. Without noise the result agrees with y exactly. With
    :math:`\eta = 0` the law is the exact posterior of Gaussian data in the limit of many steps
    (error about :math:`n^{-1/2}`); with :math:`\eta > 0` the variance is too small.

    References:
        Wang et al., *Zero-shot image restoration using denoising diffusion null-space model*,
        2023, https://arxiv.org/abs/2212.00490 (algorithm 1; :math:`\eta` in their code is .85).

    Arguments:
        steps: Number of steps, positive; one network evaluation each, and one at the end.
        grid: Spacing of the times.
        eta: Fraction of the noise that is redrawn, in [0, 1].
        eps: Time to stop at (see :class:`~scoresde.sample.Sampler`).

    Raises:
        InputError: If :math:`\eta` is outside [0, 1]; when called, if y has noise or the operator
            has no pseudo-inverse.
    """

    steps: int = 100
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise InputError(
                f"eta must be in [0, 1], got {self.eta}; pass 0 for deterministic steps."
            )

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        sde, observed = field.sde, _observation(field)
        kept = math.sqrt(1 - self.eta**2)
        for i, (t, s) in enumerate(pairwise(times.cpu())):
            data = field.denoise(x, t)
            z = (x - expand(sde.alpha(t), x) * data) / expand(sde.sigma(t), x)
            if self.eta:
                z = kept * z + self.eta * noise.diffusion(x, i, t, s)
            x = report(s, sde.perturb(observed.project(data), s, z), len(times) - 1)
        return observed.project(field.denoise(x, times[-1]))


@dataclass(frozen=True)
class Replacement(ProjectedSampler):
    r"""Overwrites the observed part of the state after every ancestral step (RePaint).

    With the projections :math:`P = A^+ A`, and :math:`x_y = A^+ y`,

    .. math:: x_s \leftarrow (I - P) x_s + \alpha_s x_y + \sigma_s P z .

    The step before this update does not depend on :math:`y`, so the two parts are inconsistent.
    Returning ``jump`` steps by the forward process and sampling them again, ``resamplings`` times
    in all, makes them consistent. With ``resamplings=1`` this is the replacement method, whose
    samples hardly depend on y; the table in :mod:`scoresde.inverse.steps` shows its law.

    References:
        Song et al. 2021, https://arxiv.org/abs/2011.13456 (appendix I.2).
        Lugmayr et al., *RePaint: inpainting using denoising diffusion probabilistic models*,
        2022, https://arxiv.org/abs/2201.09865 (algorithm 1; 250 steps, 10 and 10).

    Arguments:
        steps: Number of steps, positive; on digits 100 are no better than 50
            (``experiments/inverse_problems``).
        grid: Spacing of the times.
        resamplings: Number of times each interval of the grid is sampled, positive.
        jump: Number of steps in an interval, positive.
        eps: Time to stop at (see :class:`~scoresde.sample.Sampler`).

    Raises:
        InputError: If a number is not positive; when called, if y has noise or the operator has
            no pseudo-inverse.
    """

    steps: int = 50
    grid: Grid = field(default_factory=LogSNRGrid)
    resamplings: int = 10
    jump: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("resamplings", self.resamplings)
        check_count("jump", self.jump)

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        nodes = times.cpu()
        ends = [*range(0, len(nodes) - 1, self.jump), len(nodes) - 1]
        count = self.resamplings * (len(nodes) - 1)
        draw = 0
        for first, last in pairwise(ends):
            for again in range(self.resamplings):
                if again:
                    x = self._back(field.sde, x, nodes[last], nodes[first], noise, draw)
                for t, s in pairwise(nodes[first : last + 1]):
                    x = report(s, self._step(field, x, t, s, noise, draw), count)
                    draw += 1
        return _observation(field).project(x)

    def _step(
        self, field: Conditioned, x: Tensor, t: Tensor, s: Tensor, noise: Noise, draw: int
    ) -> Tensor:
        """Takes an ancestral step, then overwrites the observed part of the state."""
        sde, observed = field.sde, _observation(field)
        z = noise.diffusion(x, draw, t, s)
        x = AncestralPredictor()(field, x, Interval.of(sde, t, s), z)
        known = noise(x, Purpose.SOURCE, draw)
        origin = observed.project(torch.zeros_like(x))  # A^+ y
        target = sde.perturb(origin, s, known - observed.project(known) + origin)
        return observed.project(x) - origin + target

    @staticmethod
    def _back(sde: SDE, x: Tensor, s: Tensor, t: Tensor, noise: Noise, draw: int) -> Tensor:
        """Returns from the time s to the later t by the forward process."""
        a, tau = sde.transition(s, t)
        return expand(a, x) * x + expand(tau, x) * noise(x, Purpose.JUMP, draw)


@dataclass(frozen=True)
class DPSStep(StepRule):
    r"""Diffusion posterior sampling as published: a gradient step after every ancestral step.

    .. math:: x_s \leftarrow x_s - \zeta \nabla_{x_t} \lVert y - A(D(x_t)) \rVert

    The norm is over one example. The gradient step depends neither on the length of the ancestral
    step nor on the noise of y. So the number of steps is a part of the method, and the law is not
    the posterior: for data N(0, 1), observed as 1 with std .5, 1000 steps on VP with
    :math:`\zeta = .3` give the mean 1.00 and the variance .030 in place of .8 and .2.
    :class:`~scoresde.inverse.DPS` is the form that has a limit.

    References:
        Chung et al., *Diffusion posterior sampling for general noisy inverse problems*, 2023,
        https://arxiv.org/abs/2209.14687 (algorithm 1; its step
        :math:`\zeta' \nabla \lVert\cdot\rVert^2 / \lVert\cdot\rVert` is this one for
        :math:`\zeta = 2 \zeta'`).

    Arguments:
        steps: Number of steps, positive; one network evaluation and one Jacobian product each.
        grid: Spacing of the times.
        zeta: Size :math:`\zeta` of the gradient step, positive.
        eps: Time to stop at (see :class:`~scoresde.sample.Sampler`).

    Raises:
        InputError: If :math:`\zeta` is not positive.
    """

    steps: int = 1000
    zeta: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.zeta < math.inf:
            raise InputError(
                f"zeta must be positive and finite, got {self.zeta}; a typical value is 0.3."
            )

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        sde, observed = field.sde, _observation(field)
        for i, (t, s) in enumerate(pairwise(times.cpu())):
            data, push = self._push(field, observed, x, t)
            mean, std = sde.posterior(x, data, t, s)
            z = noise.diffusion(x, i, t, s)
            x = report(s, mean + std * z - self.zeta * push, len(times) - 1)
        return x

    @staticmethod
    def _push(
        field: Conditioned, observed: Observation, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the denoised estimate and the gradient of the residual's norm."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            data = field.denoise(x, t)
            # The norm has no gradient at 0.
            squares = sum_features(observed.residual(data) ** 2)
            norms = squares.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
            (push,) = torch.autograd.grad(norms.sum(), x)
        count_products(len(x))
        return data.detach(), push


@dataclass(frozen=True)
class SDEdit(Sampler):
    r"""SDEdit: adds noise to a source up to a time, then samples from there.

    .. math:: x_{t_0} = \alpha x_{source} + \sigma z

    More noise keeps less of the source. The method has no likelihood of the source: for data
    :math:`N(0, C)`, with :math:`V = \alpha^2 C + \sigma^2` and :math:`K = \alpha C / V` at
    :math:`t_0`, a stochastic sampler gives the mean :math:`\alpha K x_{source}` and the covariance
    :math:`\sigma^2 K^2 + C \sigma^2 / V`, a deterministic one
    :math:`\alpha \sqrt{C / V} x_{source}` and :math:`C \sigma^2 / V`.

    References:
        Meng et al., *SDEdit: guided image synthesis and editing with stochastic differential
        equations*, 2022, https://arxiv.org/abs/2108.01073 (algorithm 1).

    Arguments:
        t0: Start time :math:`t_0`, in (0, 1).
        sampler: Sampler whose steps below :math:`t_0` are taken.
        eps: Time to stop at (see :class:`~scoresde.sample.Sampler`); that of ``sampler`` is
            ignored.
        final_denoise: Whether to return the denoised estimate at ``eps``.

    Raises:
        InputError: If :math:`t_0` is outside (0, 1), or the sampler has no grid.
    """

    t0: float = 0.5
    sampler: GridSampler = field(default_factory=lambda: DDIM(200, LogSNRGrid(), eta=1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t0 < 1:
            raise InputError(f"t0 must be in (0, 1), got {self.t0}; a typical value is 0.5.")
        if not isinstance(self.sampler, GridSampler) or isinstance(self.sampler, StepRule):
            raise InputError(
                "sampler must be a GridSampler such as DDIM(eta=1.0) or Heun(), and not a "
                f"StepRule, got {self.sampler}."
            )

    def __call__(  # type: ignore[override]
        self,
        model: Model,
        *,
        source: Tensor,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        callback: Callable[[Step], object] | None = None,
        progress: bool = False,
        **cond: Any,
    ) -> Samples:
        """Draws one variation of each source.

        Arguments:
            model: A score function.
            source: Sources in model units, with shape ``(B, *)``.
            seed: Seed of the random streams. If None, a new one is drawn.
            seeds: Index of each sample's stream.
            callback: Called after every step.
            progress: Whether to show the progress.
            **cond: Conditions, tensors ``(B, *)``.

        Raises:
            InputError: If the arguments are inconsistent with each other or the model.
        """
        self.check(model)
        check_data(source)
        streams = Streams.of(seed, seeds, len(source), model.device)
        x = model.state(source)
        z = self.temperature * streams.normal(x.shape[1:], Purpose.SOURCE, dtype=x.dtype)
        sde = cast(ScoreFunction, model).sde
        noised = sde.perturb(x, torch.tensor(self.t0, dtype=torch.float64), z)
        return super().__call__(
            model,
            latent=noised,
            seed=streams.seed,
            seeds=streams.indices.tolist(),
            callback=callback,
            progress=progress,
            **cond,
        )

    def _check_process(self, process: SDE, eps: float) -> float:
        if self.t0 <= eps:
            raise InputError(
                f"t0 must be greater than eps={eps}, got {self.t0}; a typical value is 0.5."
            )
        return eps

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        times = self.sampler.times(field.sde, eps).cpu()
        first = torch.tensor([self.t0], dtype=torch.float64)
        below = torch.cat((first, times[times < self.t0 - 1e-9]))
        return FinalState(self.sampler.integrate(field, x, below, noise, report))


def _observation(field: Conditioned) -> Observation:
    """Returns the observation that a rule's field is bound to."""
    assert isinstance(field.model, Observed)
    return field.model.observed
