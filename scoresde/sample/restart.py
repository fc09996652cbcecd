"""Restart: go back to more noise, and come again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model import Evaluations
from scoresde.sample.base import Arrival, Noise, Sampler, Watch
from scoresde.sample.plan import Move, Node, PlannedSampler, follow
from scoresde.sample.single_step import Heun, renoise
from scoresde.sde import SDE
from scoresde.times import KarrasGrid


@dataclass(frozen=True)
class Loop:
    r"""A piece of the way that is gone again.

    Arguments:
        low: The relative noise level :math:`\sigma / \alpha` at which to go back, positive.
        high: The level to go back to, above ``low``.
        steps: The steps from there to ``low``, positive, equal in the log-SNR.
        repeats: How often, positive.
    """

    low: float = 0.06
    high: float = 0.3
    steps: int = 3
    repeats: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise InputError(f"low={self.low}, high={self.high}: they need 0 < low < high.")
        check_count("loop.steps", self.steps)
        check_count("loop.repeats", self.repeats)


@dataclass(frozen=True)
class Restart(Sampler):
    r"""Restart sampling: a deterministic sampler that goes back to more noise on its way.

    When the noise has fallen to ``low``, it is raised to ``high`` as by the forward process,

    .. math:: \frac{x}{\alpha} \leftarrow \frac{x}{\alpha}
              + \sqrt{\tilde\sigma_{high}^2 - \tilde\sigma_{low}^2} \, z,

    and the sampler goes down again; all of it ``repeats`` times. The noise makes the samples
    forget the errors so far, while what follows stays a flow, which few steps solve. Noise changes
    no marginal, so that the weak order is that of the sampler.

    References:
        Xu et al., *Restart sampling for improving generative processes*, 2023,
        https://arxiv.org/abs/2306.14878 (algorithm 2).

    Arguments:
        sampler: What goes down: a deterministic sampler, whose steps and grid count.
        loops: The pieces to go again, the noisiest first; each begins at the time of the grid
            that is nearest to its ``low``.
        eps: The time to stop at (see :class:`Sampler`); that of ``sampler`` does not count.
        final_denoise: Whether to return the expected data there.
    """

    sampler: PlannedSampler = field(default_factory=lambda: Heun(steps=17, grid=KarrasGrid()))
    loops: tuple[Loop, ...] = (Loop(),)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loops", tuple(self.loops))
        if not isinstance(self.sampler, PlannedSampler):
            raise InputError(f"sampler={self.sampler} has no plan; give one, such as Heun().")
        if any(a.low <= b.low for a, b in pairwise(self.loops)):
            raise InputError("The loops' levels low do not fall; give the noisiest first.")

    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Move]:
        """Returns the moves along nodes, with their loops.

        Raises:
            InputError: If the nodes have none to begin a loop at.
        """
        moves: list[Move] = []
        for loop in self.loops:
            here = min(range(len(nodes)), key=lambda i: abs(nodes[i].ell + math.log(loop.low)))
            high = min(loop.high, nodes[0].ratio) if not moves else loop.high
            if here == 0 or nodes[here].ratio >= high:
                raise InputError(
                    f"The grid has no time between the levels of {loop}; use more steps, or "
                    f"levels below {nodes[0].ratio:.4g}."
                )
            moves += self.sampler.plan(sde, nodes[: here + 1])
            nodes = nodes[here:]
            again = [*_between(sde, high, nodes[0], loop.steps), nodes[0]]
            for _ in range(loop.repeats):
                last = moves[-1]
                row = renoise(last.row, nodes[0], again[0])
                moves[-1] = replace(last, row=row, to=again[0])
                moves += self.sampler.plan(sde, again)
        return moves + (self.sampler.plan(sde, nodes) if len(nodes) > 1 else [])

    def _check_sde(self, sde: SDE, eps: float) -> float:
        times = self.sampler.times(sde, eps)
        self.plan(sde, Node.of(sde, times))
        return float(times[-1])

    def _run(
        self, field: Evaluations, x: Tensor, eps: float, noise: Noise, watch: Watch
    ) -> Arrival:
        moves = self.plan(field.sde, Node.of(field.sde, self.sampler.times(field.sde, eps)))
        return Arrival(follow(moves, self.sampler.evaluate, field, x, noise, watch))


def _between(sde: SDE, high: float, low: Node, steps: int) -> list[Node]:
    """Returns nodes from a level to a node, which is left out, equal in the log-SNR."""
    first = -math.log(high)
    return Node.at(sde, [first + (low.ell - first) * i / steps for i in range(steps)])
