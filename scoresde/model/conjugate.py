r"""The posterior of a Gaussian under a linear observation.

For :math:`x \sim N(m, C)` and :math:`y = H x + n` with :math:`n \sim N(0, \Sigma)`,

.. math::
    x \mid y \sim N(m + K (y - H m), C - K H C), \qquad
    K = C H^T G^{-1}, \qquad y \sim N(H m, G), \qquad G = H C H^T + \Sigma .
"""

import math

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.operators import Observation


def condition(
    observed: Observation, means: Tensor, covariances: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions Gaussians on an observation, in float64.

    Arguments:
        observed: The observation, of one example or of each of B examples.
        means: The means of K Gaussians, with shape ``(K, *)``.
        covariances: Their covariances, with shape ``(K, D, D)``.

    Returns:
        log p(y) ``(B, K)``, the means given y ``(B, K, *)``, and their covariances
        ``(B or 1, K, D, D)``.

    Raises:
        InputError: If the observation is not linear, or its noiseless measurements are linearly
            dependent.
    """
    shape = means.shape[1:]
    observed = observed.to(means.device)
    observed.check(shape)
    h = observed.matrix(shape).double()[:, None]
    y, noise = _flat(observed, shape)
    m, c = means.double().flatten(1).unsqueeze(2), covariances.double()
    factor, info = torch.linalg.cholesky_ex(h @ c @ h.mT + torch.diag_embed(noise)[:, None])
    if bool(info.any()):
        raise InputError(
            f"std must be positive for linearly dependent measurements, got {observed.std}."
        )
    r = y[:, None, :, None] - h @ m
    gain = torch.cholesky_solve(h @ c, factor).mT
    given = c - gain @ h @ c
    log_density = _log_normal(torch.linalg.solve_triangular(factor, r, upper=False), factor)
    absent = (~_measured(observed, shape)).double().sum(1, keepdim=True)
    return (
        log_density + 0.5 * math.log(2 * math.pi) * absent,
        (m + gain @ r)[..., 0].unflatten(2, shape),
        0.5 * (given + given.mT),
    )


def _flat(observed: Observation, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Returns y minus its value for an example of zeros ``(B, n)``, and its noise variances.

    Entries that are not measured are 0 in both y and H. Their noise is 1, which adds nothing.
    """
    r = _zero_residual(observed, shape)
    noise = observed.variance(r).expand(r.shape)
    noise = torch.where(observed.operator.measured(r), noise, 1)
    return r.flatten(1).double(), noise.flatten(1).double()


def _measured(observed: Observation, shape: torch.Size) -> Tensor:
    return observed.operator.measured(_zero_residual(observed, shape)).flatten(1)


def _zero_residual(observed: Observation, shape: torch.Size) -> Tensor:
    return observed.residual(observed.y.new_zeros(observed.count(shape), *shape))


def _log_normal(white: Tensor, factor: Tensor) -> Tensor:
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(2)
    squares = (white[..., 0] ** 2).sum(2)
    return -0.5 * squares - log_det - 0.5 * white.shape[2] * math.log(2 * math.pi)
