"""Linear solver for posteriors, for each example of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.passes import owned_by
from scoresde.shapes import expand, sum_features

_MOST = 50


def solve(
    matrix: Callable[[Tensor], Tensor], b: Tensor, tolerance: float, iterations: int | None = None
) -> Tensor:
    r"""Solves :math:`M u = b` by the generalised conjugate residual method, for each example.

    Like GMRES, each iteration minimises :math:`|b - M u|` over all directions so far. M need not
    be symmetric; the Jacobian of a network is not. An example stops at its tolerance, so its
    solution does not depend on other examples, and its further products do not count.

    Arguments:
        matrix: :math:`u \mapsto M u`, from ``(B, ...)`` to ``(B, ...)``.
        b: The right-hand sides, with shape ``(B, ...)``.
        tolerance: Relative residual :math:`|b - M u| / |b|` to reach, positive.
        iterations: Maximum number of iterations. If None, the dimension of one example, at most
            50.

    References:
        Eisenstat et al., *Variational iterative methods for nonsymmetric systems of linear
        equations*, 1983 (the method GCR).
    """
    u, r = torch.zeros_like(b), b
    target = tolerance * _norm(b)
    rows = torch.arange(len(b), device=b.device)
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(iterations or min(b.shape[1:].numel(), _MOST)):
        busy = _norm(r) > target
        if not bool(busy.any()):  # synchronises a GPU, which costs less than another product
            break
        with owned_by(torch.where(busy, rows, -1)):
            p, q = r, matrix(r)
        p, q = _orthogonal(p, q, kept)
        step = torch.where(busy, _dot(r, q), 0)
        u, r = u + expand(step, p) * p, r - expand(step, q) * q
        kept.append((p, q))
    return u


def _orthogonal(p: Tensor, q: Tensor, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns a direction whose image has unit length and is orthogonal to the previous images.

    A direction that depends linearly on the previous ones, up to rounding, becomes 0.
    """
    whole = _norm(q)
    for direction, image in kept:
        share = expand(_dot(q, image), q)
        p, q = p - share * direction, q - share * image
    size = _norm(q)
    new = size > 100 * torch.finfo(q.dtype).eps * whole
    scale = torch.where(new, 1 / torch.where(new, size, 1), 0)
    return p * expand(scale, p), q * expand(scale, q)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return sum_features(a * b)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()
