r"""Brownian motion as a function of time.

A solver that integrates once can draw a new increment for every step. To compare solvers *along
one path*, or to adapt the steps to the path, the motion :math:`W(t)` must be a function: at any
times, queried in any order, it must return the same values. Levy's construction provides one: the
path over an interval is fixed at its ends, then at its midpoint, then at the midpoints of its
halves. The random number of every node of this tree is a function of the node
(:mod:`scoresde.streams`), so nothing has to be stored.

Over an interval of length :math:`h` the tree holds the increment :math:`W` and the space-time Levy
area :math:`H`, the mean deviation of the path from its chord,

.. math:: H = \frac1h \int_0^h \left( W_u - \frac uh W_h \right) du \sim N(0, h/12), \qquad
          \int_0^h W_u \, du = h \left( \tfrac12 W + H \right),

independent of :math:`W`. Its halves follow by conditioning one Gaussian on another: with
independent :math:`Z \sim N(0, h/16)` and :math:`N \sim N(0, h/48)`,

.. math::
    W_{left} = \tfrac12 W + \tfrac32 H + Z, \quad W_{right} = W - W_{left}, \quad
    H_{left} = \tfrac14 H - \tfrac12 Z + N, \quad H_{right} = \tfrac14 H - \tfrac12 Z - N .

*Check:* :math:`\mathrm{Var}\, W_{left} = \tfrac h4 + \tfrac94 \tfrac h{12} + \tfrac h{16} =
\tfrac h2`, :math:`\mathrm{Var}\, H_{left} = \tfrac h{192} + \tfrac h{64} + \tfrac h{48} =
\tfrac h{24}`, and :math:`\mathrm{Cov}(W_{left}, H_{left}) = \tfrac h{32} - \tfrac h{32} = 0`.

Within a leaf of the tree, of length h, the value at the distance r is drawn from the exact law
given its W and H,

.. math:: W_r = \frac rh W + \frac{6 r (h - r)}{h^2} H + \sqrt{\frac{r (h - r)}{h}
          \left( 1 - \frac{3 r (h - r)}{h^2} \right)} \, Z .

So the law of :math:`W` is exact at any set of times with at most one in each leaf. The *joint* law
of several times in one leaf, and the area of a part of a leaf, are approximate, at a scale of
:math:`2^{-20} \approx 10^{-6}` by default.

A query costs two normal numbers per component on each level from the root to the leaf. If the
batch shares its times, the path through the tree to the last leaf is cached, so a nearby query
descends only from the node where the paths diverge.

References:
    Levy, *Processus stochastiques et mouvement brownien*, 1948.
    Li et al., *Scalable gradients for stochastic differential equations*, 2020,
    https://arxiv.org/abs/2001.01328 (virtual Brownian tree).
    Foster, Lyons and Oberhauser, *An optimal polynomial approximation of Brownian motion*, 2020,
    https://arxiv.org/abs/1904.06998.
    Jelincic, Foster and Kidger, *Single-seed generation of Brownian paths and integrals for
    adaptive and high order SDE solvers*, 2024, https://arxiv.org/abs/2405.06464.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams

_TOGETHER = 2**20  # normal numbers per batch of draws: fewer cost launches, more cost memory


@dataclass(frozen=True, eq=False)
class _Piece:
    """The path over an interval of the tree; arrays ``(B, size)``, float64."""

    length: float
    start: Tensor  # W at the left end
    before: Tensor  # the integral of W up to the left end
    w: Tensor
    h: Tensor

    def half(self, right: int | Tensor, numbers: Tensor) -> "_Piece":
        """Returns the left or the right half.

        Arguments:
            right: 0 or 1, for all examples or for each, ``(B, 1)``.
            numbers: Normal numbers, ``(B, 2, size)``.
        """
        z = math.sqrt(self.length / 16) * numbers[:, 0]
        n = math.sqrt(self.length / 48) * numbers[:, 1]
        side, length = 1 - 2 * right, 0.5 * self.length
        w, lean = 0.5 * self.w, 1.5 * self.h + z
        h = 0.25 * self.h - 0.5 * z
        # The left half ends, and the right half starts, at ``w + lean``.
        area = length * (self.start + 0.5 * (w + lean) + h + n)
        start, before = self.start + right * (w + lean), self.before + right * area
        return _Piece(length, start, before, w + side * lean, h + side * n)

    def at(self, part: float | Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Returns W and its integral at a fraction in [0, 1] of the interval, a leaf."""
        bridge = part * (1 - part)
        variance = self.length * bridge * (1 - 3 * bridge)
        z = variance**0.5 * numbers[:, 0]
        moved = part * self.w + 6 * bridge * self.h + z
        return self.start + moved, self.before + part * self.length * (self.start + 0.5 * moved)


class BrownianPath:
    """A Brownian motion on [0, 1] for each of B examples.

    The path of an example depends only on its stream. It is computed in float64.

    Arguments:
        streams: One random stream per example.
        size: The number of components of an example.
        dtype: The data type of the values.
        depth: Depth of the tree, in [1, 30]; its leaves have length :math:`2^{-depth}`.

    Raises:
        InputError: If the depth is out of range.

    Example:
        >>> path = BrownianPath(Streams.of(0, batch=2), 3, torch.float64)
        >>> first, both = path.increment(0.0, 0.3), path.increment(0.0, 0.7)
        >>> torch.allclose(first + path.increment(0.3, 0.7), both)
        True
    """

    def __init__(
        self, streams: Streams, size: int, dtype: torch.dtype = torch.float32, depth: int = 20
    ) -> None:
        if not 1 <= depth <= 30:
            raise InputError(f"depth must be in [1, 30], got {depth}; 20 resolves 1e-6.")
        self.streams = streams
        self.size = size
        self.dtype = dtype
        self.depth = depth
        (numbers,) = self._normals(torch.zeros_like(streams.indices)[None])
        w, h = numbers[:, 0], numbers[:, 1] / math.sqrt(12)
        zero = torch.zeros_like(w)
        # From the root to the leaf of the last query shared by all examples.
        self._way = [_Piece(1.0, zero, zero, w, h)]
        self._leaf = 0

    def __call__(self, t: Tensor | float) -> Tensor:
        """Returns W at times in [0, 1], ``()`` or ``(B,)``, with shape ``(B, size)``."""
        return self._at(t)[0].to(self.dtype)

    def increment(self, s: Tensor | float, t: Tensor | float) -> Tensor:
        """Returns W(t) - W(s); arguments as for a call."""
        first = self._at(s)[0]
        return (self._at(t)[0] - first).to(self.dtype)

    def with_integral(self, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        r"""Returns W(t) - W(s) and :math:`\int_s^t (W_u - W_s) \, du`; arguments as for a call."""
        first, before = self._at(s)
        last, after = self._at(t)
        h = torch.as_tensor(t, dtype=torch.float64) - torch.as_tensor(s, dtype=torch.float64)
        area = after - before - h.to(first.device).reshape(-1, 1) * first
        return (last - first).to(self.dtype), area.to(self.dtype)

    def take(self, rows: Tensor) -> "BrownianPath":
        """Returns the paths of some examples, given their indices, int64."""
        return BrownianPath(self.streams[rows], self.size, self.dtype, self.depth)

    def _at(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns W and its integral from 0 to t, float64."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self._each(t) if t.ndim else self._shared(float(t))

    def _shared(self, t: float) -> tuple[Tensor, Tensor]:
        """Returns W and its integral at one time for all examples."""
        if not 0 <= t <= 1:
            raise InputError(f"t must be in [0, 1], the interval of the Brownian path, got {t}.")
        place = t * 2**self.depth
        leaf = min(int(place), 2**self.depth - 1)
        known = self.depth - (leaf ^ self._leaf).bit_length()
        del self._way[known + 1 :]
        self._leaf = leaf
        known = len(self._way) - 1
        leaves = torch.full_like(self.streams.indices, leaf)
        numbers = self._normals(self._nodes(leaves)[known:])
        for level in range(known, self.depth):
            right = leaf >> (self.depth - 1 - level) & 1
            self._way.append(self._way[-1].half(right, next(numbers)))
        return self._way[-1].at(place - leaf, next(numbers))

    def _each(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns W and its integral at a time per example."""
        place = t.to(self.streams.indices.device) * 2**self.depth
        # No check: it would synchronise with the GPU.
        leaf = place.to(torch.int64).clamp(0, 2**self.depth - 1)
        piece, nodes = self._way[0], self._nodes(leaf)
        numbers = self._normals(nodes)
        for node in nodes[1:]:
            piece = piece.half((node & 1).double()[:, None], next(numbers))
        return piece.at((place - leaf)[:, None], next(numbers))

    def _nodes(self, leaf: Tensor) -> Tensor:
        """Returns the nodes from the root, 1, to leaves; node i has children 2i and 2i + 1."""
        levels = torch.arange(self.depth, -1, -1, device=leaf.device)
        return (leaf + 2**self.depth) >> levels[:, None]

    def _normals(self, nodes: Tensor) -> Iterator[Tensor]:
        """Yields normal numbers ``(B, 2, size)`` for each row of nodes ``(levels, B)``."""
        batch, indices = nodes.shape[1], self.streams.indices
        for part in nodes.split(max(1, _TOGETHER // max(1, 2 * batch * self.size))):
            streams = Streams(self.streams.seed, indices.repeat(len(part)))
            numbers = streams.normal(
                (2, self.size), Purpose.BROWNIAN, part.flatten(), torch.float64
            )
            yield from numbers.split(batch)
