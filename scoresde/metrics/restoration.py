"""Errors of restored examples, and calibration of their spread."""

import math

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams


def psnr(x: Tensor, truth: Tensor, span: float) -> Tensor:
    r"""Returns the peak signal-to-noise ratio of each example in dB, ``(N,)``.

    .. math:: 20 \log_{10} \frac{\text{span}}{\text{rms}(x - \text{truth})}

    Arguments:
        x: Restored examples, with shape ``(N, *)``.
        truth: True examples, with the same shape.
        span: Difference of the largest and the smallest value, in the same units, positive.

    Raises:
        InputError: If the span is not positive and finite.

    Example:
        >>> round(float(psnr(torch.full((1, 4), 0.1), torch.zeros(1, 4), span=1.0)), 3)
        20.0
    """
    if not 0 < span < math.inf:
        raise InputError(
            f"span must be positive and finite, got {span}; use the difference of the largest and "
            "the smallest value."
        )
    error = sum_features((x.double() - truth.double()) ** 2) / truth[0].numel()
    return 20 * math.log10(span) - 10 * torch.log10(error)


def ssim(x: Tensor, truth: Tensor, span: float) -> Tensor | None:
    """Returns the structural similarity of images, ``(N, C, H, W)`` to ``(N,)``, by scikit-image.

    Arguments:
        x: Restored images.
        truth: True images.
        span: Difference of the largest and the smallest value, positive.

    Returns:
        None if scikit-image is not installed, or an image is smaller than 3 pixels on a side.

    References:
        Wang et al., *Image quality assessment: from error visibility to structural similarity*,
        2004; windows of 7 pixels, or the largest odd number that fits.
    """
    side = min(truth.shape[-2:])
    if side < 3:
        return None
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    window = min(7, side - 1 + side % 2)
    pairs = zip(x.double().numpy(), truth.double().numpy(), strict=True)
    values = [
        structural_similarity(a, b, data_range=span, channel_axis=0, win_size=window)
        for a, b in pairs
    ]
    return torch.tensor(values, dtype=torch.float64)


def ranks(draws: Tensor, truth: Tensor, seed: int = 0) -> Tensor:
    """Returns the number of K draws below the truth, ``(N, *)``; ties are broken at random.

    If the draws are of the posterior, each rank is uniform on 0 to K.

    Arguments:
        draws: The draws, with shape ``(N, K, *)``.
        truth: The true values, with shape ``(N, *)``.
        seed: Seed of the random streams for ties.
    """
    truth = truth.unsqueeze(1)
    below, equal = (draws < truth).sum(1), (draws == truth).sum(1)
    u = Streams.of(seed, batch=len(draws)).uniform(below.shape[1:], Purpose.MEASUREMENT, 1)
    return below + (u * (equal + 1)).long().clamp(max=equal)


def spread_ratio(draws: Tensor, truth: Tensor) -> float:
    r"""Returns the error of the mean of K draws relative to the error expected from their spread.

    .. math:: \sqrt{\frac{\sum (\bar x - x)^2}{(1 + 1/K) \sum s^2}}

    It is 1 in expectation for draws from the posterior, above 1 if they are too close together,
    and NaN if they have no spread.

    Arguments:
        draws: The draws, with shape ``(N, K, *)``, K at least 2.
        truth: The true values, with shape ``(N, *)``.
    """
    draws, truth = draws.double(), truth.double()
    error = ((draws.mean(1) - truth) ** 2).sum()
    expected = (1 + 1 / draws.shape[1]) * draws.var(1).sum()
    return float((error / expected).sqrt()) if float(expected) > 0 else math.nan
