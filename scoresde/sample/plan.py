r"""Samplers as lists of linear stages, computed before the first evaluation.

Every update of a fixed-step sampler is linear in the state, in the model's outputs and in the
noise, with coefficients that depend only on the times,

.. math:: x' = a \, x + \sum_j w_j h_j + \sum_j n_j z_j ,

where :math:`h_j` are outputs of the model and :math:`z_j` independent standard normal noises of
the same step, both with the newest first. All coefficients are computed once, on the host and in
float64. Each :class:`Stage` is then a network evaluation and a few additions, without a
synchronisation.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.model import Conditioned
from scoresde.recipe import renamed
from scoresde.sample.base import GridSampler, Noise, ProgressReporter
from scoresde.sde import SDE

__getattr__ = renamed(__name__)


@dataclass(frozen=True, eq=False)
class Node:
    r"""A time of the grid and the values of the process there.

    Arguments:
        t: The time, float64 ``()``.
        alpha: Scale of the signal.
        sigma: Standard deviation of the noise, positive.
        ell: Half the log-SNR, :math:`\ell = \log (\alpha / \sigma)`, which increases along a grid.
        place: Variable for polynomials and for the division of steps: :math:`\ell`, or the bounded
            variable b where the SNR is zero at t = 1 (see :class:`~scoresde.sde.SDE`).
    """

    t: Tensor
    alpha: float
    sigma: float
    ell: float
    place: float

    @staticmethod
    def of(sde: SDE, times: Tensor) -> list["Node"]:
        """Returns the nodes at times, float64 ``(n,)``."""
        alpha, sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
        ell = (0.5 * sde.log_snr(times)).tolist()
        place = sde.bounded(times).tolist() if sde.zero_snr else ell
        parts = zip(times.cpu().unbind(), alpha, sigma, ell, place, strict=True)
        return [Node(*part) for part in parts]

    @staticmethod
    def at(sde: SDE, places: Sequence[float]) -> list["Node"]:
        """Returns the nodes at values of ``place``."""
        values = torch.tensor(places, dtype=torch.float64)
        times = sde.time_of_bounded(values) if sde.zero_snr else sde.time(2 * values)
        return Node.of(sde, times.clamp(0, 1))

    @staticmethod
    def at_ell(sde: SDE, ell: Sequence[float]) -> list["Node"]:
        """Returns the nodes at values of half the log-SNR."""
        bounded = [2 * math.asinh(math.exp(value)) for value in ell] if sde.zero_snr else ell
        return Node.at(sde, bounded)

    @property
    def ratio(self) -> float:
        r"""The relative noise level :math:`\tilde\sigma = \sigma / \alpha = e^{-\ell}`."""
        return math.exp(-self.ell)


@dataclass(frozen=True)
class LinearUpdate:
    """Coefficients of one linear update.

    Arguments:
        scale: Coefficient of the state.
        outputs: Coefficients of the model's outputs, the newest first.
        noises: Coefficients of the step's noises, the newest first; the newest is drawn for this
            update.
    """

    scale: float
    outputs: tuple[float, ...]
    noises: tuple[float, ...] = ()

    def __call__(self, x: Tensor, outputs: Sequence[Tensor], noises: Sequence[Tensor]) -> Tensor:
        """Returns the updated state, in the data type of ``x``."""
        y = self.scale * x
        for weights, arrays in ((self.outputs, outputs), (self.noises, noises)):
            for weight, array in zip(weights, arrays, strict=False):
                if weight:
                    y.add_(array, alpha=weight)
        return y

    def then(self, factor: float, noise: float = 0.0) -> "LinearUpdate":
        """Returns this update followed by a factor and by independent noise."""
        assert not self.noises or noise == 0
        scaled = (tuple(factor * w for w in ws) for ws in (self.outputs, self.noises))
        row = LinearUpdate(factor * self.scale, *scaled)
        return replace(row, noises=(noise,)) if noise else row

    def in_data(self, alpha: float, sigma: float) -> "LinearUpdate":
        r"""Converts an update by one predicted noise to an update by the denoised estimate.

        With :math:`\hat z = (x - \alpha D) / \sigma` the coefficients stay finite towards zero
        SNR, where those of x and of the noise cancel.
        """
        (weight,) = self.outputs
        share = weight / sigma
        return replace(self, scale=self.scale + share, outputs=(-share * alpha,))


@dataclass(frozen=True)
class Stage:
    """One network evaluation and the update that follows it.

    Arguments:
        at: Node of the model evaluation.
        to: Node at the end of the update.
        row: Update of the state at the start of the step.
        begins: Whether the current state is the start of a step; False for a further stage.
        ends: Whether the update ends a step.
        correction: Update of the state at the start of the *last* step; once the output at ``at``
            is known, its result replaces the current state.
    """

    at: Node
    to: Node
    row: LinearUpdate
    begins: bool = True
    ends: bool = True
    correction: LinearUpdate | None = None


@dataclass(frozen=True)
class PlannedSampler(GridSampler):
    """Base class for samplers that are lists of stages; arguments as for :class:`GridSampler`."""

    @abstractmethod
    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        """Returns the stages along nodes, at least two."""

    def evaluate(self, field: Conditioned, x: Tensor, t: Tensor) -> Tensor:
        """Returns the model output that the updates use.

        This is the predicted noise. Where the SNR is zero at t = 1 it is the denoised estimate,
        since the noise contains no information on the data there.
        """
        return field.denoise(x, t) if field.sde.zero_snr else field.noise(x, t)

    def integrate(
        self,
        field: Conditioned,
        x: Tensor,
        times: Tensor,
        noise: Noise,
        report: ProgressReporter,
    ) -> Tensor:
        stages = self.plan(field.sde, Node.of(field.sde, times))
        return run_stages(stages, self.evaluate, field, x, noise, report)


def run_stages(
    stages: Sequence[Stage],
    evaluate: Callable[[Conditioned, Tensor, Tensor], Tensor],
    field: Conditioned,
    x: Tensor,
    noise: Noise,
    report: ProgressReporter,
) -> Tensor:
    """Applies stages to states ``(B, *)``.

    Arguments:
        stages: The stages, at least one.
        evaluate: Returns the model output that the updates use.
        field: The model.
        x: The states.
        noise: Source of the noise.
        report: Called after every step.
    """
    base, noises = x, deque[Tensor]()
    # Older outputs are freed: memory holds only the outputs of the longest update.
    outputs = deque[Tensor](maxlen=max(_reach(stage) for stage in stages))
    steps = sum(stage.ends for stage in stages)
    for i, stage in enumerate(stages):
        outputs.appendleft(evaluate(field, x, stage.at.t))
        if stage.correction is not None:
            base = report.again(stage.at.t, stage.correction(base, outputs, ()))
        elif stage.begins:
            base = x
        if stage.begins:
            noises.clear()
        if stage.row.noises:
            noises.appendleft(noise.diffusion(x, i, stage.at.t, stage.to.t))
        x = stage.row(base, outputs, noises)
        if stage.ends:
            x = report(stage.to.t, x, steps)
    return x


def _reach(stage: Stage) -> int:
    return max(len(row.outputs) for row in (stage.row, stage.correction) if row is not None)
