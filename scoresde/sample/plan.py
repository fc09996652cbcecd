r"""A sampler's way written down beforehand: a list of linear moves.

All that a fixed-step sampler does to its state is linear in the state, in the model's outputs and
in the noise, with coefficients that depend on the times alone,

.. math:: x' = a \, x + \sum_j w_j h_j + \sum_j n_j z_j ,

where :math:`h_j` are outputs of the model, the newest first, and :math:`z_j` independent standard
normal noises of the same step, likewise. So a sampler is a :class:`Plan`: all coefficients are
computed once, on the host and in float64, and the walk itself is a network pass and a few
additions for each move, without a synchronisation.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde.model import Evaluations
from scoresde.sample.base import GridSampler, Noise, Watch
from scoresde.sde import SDE


@dataclass(frozen=True, eq=False)
class Node:
    r"""A time of a walk, and what the process is there.

    Arguments:
        t: The time, float64 ``()``.
        alpha: The signal's scale.
        sigma: The noise's standard deviation, positive.
        ell: Half the log-SNR, :math:`\ell = \log (\alpha / \sigma)`, in which walks rise.
    """

    t: Tensor
    alpha: float
    sigma: float
    ell: float

    @staticmethod
    def of(sde: SDE, times: Tensor) -> list["Node"]:
        """Returns the nodes at times, float64 ``(n,)``."""
        alpha, sigma = sde.alpha(times).tolist(), sde.sigma(times).tolist()
        ell = (0.5 * sde.log_snr(times)).tolist()
        parts = zip(times.cpu().unbind(), alpha, sigma, ell, strict=True)
        return [Node(*part) for part in parts]

    @staticmethod
    def at(sde: SDE, ell: Sequence[float]) -> list["Node"]:
        """Returns the nodes at values of half the log-SNR."""
        times = sde.time(2 * torch.tensor(ell, dtype=torch.float64)).clamp(0, 1)
        return Node.of(sde, times)

    @property
    def ratio(self) -> float:
        r"""The relative noise level :math:`\tilde\sigma = \sigma / \alpha = e^{-\ell}`."""
        return math.exp(-self.ell)


@dataclass(frozen=True)
class Row:
    """The coefficients of one linear update.

    Arguments:
        scale: That of the state.
        outputs: Those of the model's outputs, the newest first.
        noises: Those of the step's noises, the newest first; the newest is drawn for this row.
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

    def then(self, factor: float, noise: float = 0.0) -> "Row":
        """Returns this row, followed by a factor and by noise of its own."""
        assert not self.noises or noise == 0
        scaled = (tuple(factor * w for w in ws) for ws in (self.outputs, self.noises))
        row = Row(factor * self.scale, *scaled)
        return replace(row, noises=(noise,)) if noise else row


@dataclass(frozen=True)
class Move:
    """One network pass, and the update that follows it.

    Arguments:
        at: Where the model is evaluated.
        to: Where the update leads.
        row: The update, of the state with which the step began.
        begins: Whether the state reached so far begins a step; ``False`` for a further stage.
        ends: Whether the update ends a step.
        correction: An update of the state with which the *last* step began that replaces the
            state reached so far, once the output at ``at`` is known.
    """

    at: Node
    to: Node
    row: Row
    begins: bool = True
    ends: bool = True
    correction: Row | None = None


@dataclass(frozen=True)
class PlannedSampler(GridSampler):
    """Abstract sampler that is a list of moves; arguments as for :class:`GridSampler`."""

    @abstractmethod
    def plan(self, sde: SDE, nodes: Sequence[Node]) -> list[Move]:
        """Returns the moves along nodes, at least two."""

    def evaluate(self, field: Evaluations, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output of the model that the rows are for: the expected noise."""
        return field.noise(x, t)

    def walk(
        self, field: Evaluations, x: Tensor, times: Tensor, noise: Noise, watch: Watch
    ) -> Tensor:
        moves = self.plan(field.sde, Node.of(field.sde, times))
        return follow(moves, self.evaluate, field, x, noise, watch)


def follow(
    moves: Sequence[Move],
    evaluate: Callable[[Evaluations, Tensor, Tensor], Tensor],
    field: Evaluations,
    x: Tensor,
    noise: Noise,
    watch: Watch,
) -> Tensor:
    """Brings states ``(B, *)`` along moves.

    Arguments:
        moves: The moves, at least one.
        evaluate: Returns the model's output that their rows are for.
        field: The model.
        x: The states.
        noise: Where their noise comes from.
        watch: Is told of every step.
    """
    base, noises = x, deque[Tensor]()
    # Older outputs are let go of: memory is that of the longest row.
    outputs = deque[Tensor](maxlen=max(_reach(move) for move in moves))
    steps = sum(move.ends for move in moves)
    for i, move in enumerate(moves):
        outputs.appendleft(evaluate(field, x, move.at.t))
        if move.correction is not None:
            base = move.correction(base, outputs, ())
        elif move.begins:
            base = x
        if move.begins:
            noises.clear()
        if move.row.noises:
            noises.appendleft(noise.diffusion(x, i, move.at.t, move.to.t))
        x = move.row(base, outputs, noises)
        if move.ends:
            watch(move.to.t, x, steps)
    return x


def _reach(move: Move) -> int:
    return max(len(row.outputs) for row in (move.row, move.correction) if row is not None)
