"""Restart sampling: returns to a higher noise level and integrates again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Conditioned
from scoresde.recipe import accepts_moved
from scoresde.sample.base import FinalState, Noise, ProgressReporter, Sampler
from scoresde.sample.plan import Node, PlannedSampler, Stage, run_stages
from scoresde.sample.single_step import Heun, renoise
from scoresde.sde import SDE
from scoresde.times import KarrasGrid


@dataclass(frozen=True)
class RestartInterval:
    r"""An interval of noise levels that is integrated again.

    Arguments:
        low: Relative noise level :math:`\sigma / \alpha` that triggers a restart, positive.
        high: Level to restart from, above ``low``.
        steps: Number of steps from ``high`` to ``low``, positive, equal in the log-SNR.
        repeats: Number of restarts, positive.
    """

    low: float = 0.06
    high: float = 0.3
    steps: int = 3
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise InputError(
                "low and high must be positive and finite, with low < high, got "
                f"{self.low} and {self.high}."
            )
        check_count("interval.steps", self.steps)
        check_count("interval.repeats", self.repeats)


@accepts_moved
@dataclass(frozen=True)
class Restart(Sampler):
    r"""Restart sampling: a deterministic sampler that returns to higher noise levels.

    When the noise has fallen to ``low``, it is raised to ``high`` as by the forward process,

    .. math:: \frac{x}{\alpha} \leftarrow \frac{x}{\alpha}
              + \sqrt{\tilde\sigma_{high}^2 - \tilde\sigma_{low}^2} \, z,

    and the sampler integrates down to ``low`` again, ``repeats`` times in all. The noise makes the
    samples forget earlier errors, while each part remains a flow, which needs few steps. Noise
    changes no marginal, so the weak order is that of the sampler.

    References:
        Xu et al., *Restart sampling for improving generative processes*, 2023,
        https://arxiv.org/abs/2306.14878 (algorithm 2).

    Arguments:
        sampler: Deterministic sampler; its steps and grid are used.
        intervals: Intervals to repeat, the noisiest first; each begins at the time of the grid
            nearest to its ``low``.
        eps: Time to stop at (see :class:`Sampler`); that of ``sampler`` is ignored.
        final_denoise: Whether to return the denoised estimate at ``eps``.
    """

    sampler: PlannedSampler = field(default_factory=lambda: Heun(steps=17, grid=KarrasGrid()))
    intervals: tuple[RestartInterval, ...] = (RestartInterval(),)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "intervals", tuple(self.intervals))
        if not isinstance(self.sampler, PlannedSampler):
            raise InputError(
                f"sampler must be a PlannedSampler such as Heun(), got {self.sampler}."
            )
        if any(a.low <= b.low for a, b in pairwise(self.intervals)):
            lows = [interval.low for interval in self.intervals]
            raise InputError(f"intervals must be sorted by decreasing low, got {lows}.")

    @property
    def convergence(self) -> int | None:
        """The weak order, which is the order of ``sampler``."""
        return self.sampler.convergence

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Stage]:
        """Returns the stages along nodes, including the repeated intervals.

        Raises:
            InputError: If no node can begin an interval.
        """
        stages: list[Stage] = []
        for interval in self.intervals:
            here = min(range(len(nodes)), key=lambda i: abs(nodes[i].ell + math.log(interval.low)))
            high = min(interval.high, nodes[0].ratio) if not stages else interval.high
            if here == 0 or nodes[here].ratio >= high:
                raise InputError(
                    "The interval must lie within the levels of the grid, "
                    f"[{nodes[-1].ratio:.4g}, {nodes[0].ratio:.4g}], with a time of the grid near "
                    f"its low level, got {interval}; use more steps, levels in this range, or a "
                    "smaller eps."
                )
            stages += self.sampler.plan(sde, nodes[: here + 1])
            nodes = nodes[here:]
            again = [*_between(sde, high, nodes[0], interval.steps), nodes[0]]
            for _ in range(interval.repeats):
                last = stages[-1]
                row = renoise(last.row, nodes[0], again[0])
                stages[-1] = replace(last, row=row, to=again[0])
                stages += self.sampler.plan(sde, again)
        return stages + (self.sampler.plan(sde, nodes) if len(nodes) > 1 else [])

    def _check_process(self, process: SDE, eps: float) -> float:
        times = self.sampler.times(process, eps)
        self.plan(process, Node.of(process, times))
        return float(times[-1])

    def _run(
        self, field: Conditioned, x: Tensor, eps: float, noise: Noise, report: ProgressReporter
    ) -> FinalState:
        stages = self.plan(field.sde, Node.of(field.sde, self.sampler.times(field.sde, eps)))
        return FinalState(run_stages(stages, self.sampler.evaluate, field, x, noise, report))


def _between(sde: SDE, high: float, low: Node, steps: int) -> list[Node]:
    """Returns nodes equal in the log-SNR from a level to a node, which is excluded."""
    first = -math.log(high)
    return Node.at_ell(sde, [first + (low.ell - first) * i / steps for i in range(steps)])
