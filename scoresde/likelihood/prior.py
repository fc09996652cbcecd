"""Divergences between the prior and the noised data at t = 1."""

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.sde import SDE, as_time
from scoresde.shapes import check_data, sum_features

_LARGEST = 4096  # rows of a matrix whose eigenvalues are taken: about half a minute
_ROWS = 4096  # examples converted to float64 at once


def prior_kl(sde: SDE, x: Tensor) -> Tensor:
    r"""Returns the divergence of each noised example from the prior.

    .. math:: KL(N(\alpha_1 x, \sigma_1^2 I) \,\|\, N(0, \pi^2 I)) = \frac{\alpha_1^2}{2 \pi^2}
              \lVert x \rVert^2 + \tfrac{D}{2} (r - \log(1 + r)), \qquad
              r = \frac{\sigma_1^2}{\pi^2} - 1

    Arguments:
        sde: The forward process.
        x: Data in model units, with shape ``(B, *)``.

    Returns:
        The divergences in nats, with shape ``(B,)``, differentiable in the weights of a schedule.
    """
    signal, noise = _at_the_end(sde, x.device)
    constant = 0.5 * x.shape[1:].numel() * _excess(noise - 1)
    return 0.5 * signal * sum_features(x.square()) + constant


def prior_mismatch(sde: SDE, mean: Tensor, variances: Tensor) -> Tensor:
    r"""Returns the divergence of the noised data at t = 1 from the prior.

    For data with the mean :math:`m` and a covariance with the eigenvalues :math:`c_i`,

    .. math:: KL(N(\alpha_1 m, \alpha_1^2 C + \sigma_1^2 I) \,\|\, N(0, \pi^2 I))
              = \tfrac12 \left( \frac{\alpha_1^2}{\pi^2} \lVert m \rVert^2
              + \sum_i r_i - \log(1 + r_i) \right), \qquad
              r_i = \frac{\alpha_1^2 c_i + \sigma_1^2}{\pi^2} - 1 .

    The logarithm of the prior is quadratic. So for data that are not Gaussian, the divergence of
    :math:`p_1` is this value plus the divergence of :math:`p_1` from the Gaussian with its
    moments, which the noise makes tiny. If the prior is used for :math:`p_1`, the mean
    log-likelihood under an exact score is too small by this divergence.

    VE adds noise of :math:`\sigma_1` to unscaled data. The mean costs
    :math:`\lVert m \rVert^2 / 2 \sigma_1^2`, which dominates unless the data are centred. The
    variances cost :math:`\tfrac14 \sum (c_i / \sigma_1^2)^2`. VP has
    :math:`r_i = \alpha_1^2 (c_i - 1)` with :math:`\alpha_1^2 = 4 \cdot 10^{-5}`.

    Arguments:
        sde: The forward process.
        mean: The mean of the data in model units, of any shape with D elements.
        variances: The eigenvalues of their covariance, not negative, with shape ``(D,)``.

    Returns:
        The divergence in nats, float64, with shape ``()``.

    Raises:
        InputError: If the number of eigenvalues is not that of the mean's elements, or one is
            negative.

    Example:
        >>> from scoresde import VESDE
        >>> prior_mismatch(VESDE(), torch.ones(2), torch.zeros(2))
        tensor(0.0004, dtype=torch.float64)
    """
    mean, variances = mean.double(), variances.double()
    if variances.shape != (mean.numel(),) or not bool((variances >= 0).all()):
        least = min(variances.flatten().tolist(), default=None)
        raise InputError(
            f"variances must have shape ({mean.numel()},), one eigenvalue >= 0 per element of "
            f"the mean, got shape {tuple(variances.shape)} with minimum {least}; use "
            "spectrum(data)."
        )
    signal, noise = _at_the_end(sde, mean.device)
    excess = _excess(signal * variances + (noise - 1)).sum()
    return 0.5 * (signal * mean.square().sum() + excess)


def spectrum(data: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of data and the eigenvalues of their covariance.

    The covariance of N examples is ``(D, D)``. Its eigenvalues, except zeros, are those of the
    ``(N, N)`` matrix of inner products. The smaller of the two matrices is decomposed.

    Arguments:
        data: Data in model units, with shape ``(N, *)``; at least two examples.

    Returns:
        The mean, with shape ``(*)``, and the eigenvalues, ascending, with shape ``(D,)``; float64.

    Raises:
        InputError: If the data are not a batch of two or more finite examples, or both N and D are
            above 4096.
    """
    check_data(data)
    n, d = len(data), data[0].numel()
    if n < 2 or min(n, d) > _LARGEST:
        raise InputError(
            f"data must have at least 2 examples, and at most {_LARGEST} if the dimension exceeds "
            f"{_LARGEST}, got {n} examples of dimension {d}."
        )
    mean = data.mean(0, dtype=torch.float64)
    rows = (part.double().flatten(1) - mean.flatten() for part in data.split(_ROWS))
    if n < d:
        centred = torch.cat(list(rows))
        values = torch.linalg.eigvalsh(centred @ centred.T / n)
        values = torch.cat((values.new_zeros(d - n), values))
    else:
        values = torch.linalg.eigvalsh(sum(part.T @ part for part in rows) / n)
    return mean, values.clamp(min=0)


def _at_the_end(sde: SDE, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the variances of signal and noise at t = 1, in units of the prior's."""
    end, scale = as_time(1.0).to(device), sde.prior_scale()
    return (sde.alpha(end) / scale) ** 2, (sde.sigma(end) / scale) ** 2


def _excess(r: Tensor) -> Tensor:
    """Returns r - log(1 + r), from its series where the difference would lose digits."""
    series = r**2 * (1 / 2 - r * (1 / 3 - r * (1 / 4 - r * (1 / 5 - r / 6))))
    return torch.where(r.abs() < 1e-3, series, r - torch.log1p(r))
