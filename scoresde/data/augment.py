r"""Augmentations that are conditions of the network, so they do not leak into its samples.

An augmentation draws parameters :math:`a` for each example, changes it accordingly, and passes
:math:`a` to the network as a condition. The network learns the score of the augmented data *given*
how it was augmented; :math:`a = 0` denotes unchanged data, and sampling uses this value.

References:
    Karras et al., *Training generative adversarial networks with limited data*, 2020,
    https://arxiv.org/abs/2006.06676 (the geometric transformations).
    Karras et al., *Elucidating the design space of diffusion-based generative models*, 2022,
    https://arxiv.org/abs/2206.00364 (appendix F.2, with the parameters as conditions).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from scoresde.errors import InputError
from scoresde.streams import Purpose, Streams


class Augmentation(ABC):
    """Base class for augmentations, which change examples and return labels of the change."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of labels per example."""

    @abstractmethod
    def __call__(self, x: Tensor, streams: Streams, draw: int = 0) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Arguments:
            x: Examples in model units, with shape ``(B, *)``.
            streams: Random streams of the examples; each example is augmented by its own stream.
            draw: Index of the augmentation: the number of the epoch.

        Returns:
            Augmented examples ``(B, *)`` and labels ``(B, width)``, 0 for an unchanged example.
        """


@dataclass(frozen=True)
class GeometricAugmentation(Augmentation):
    r"""Mirrors, scales, turns, stretches and shifts images.

    Each change happens with the given probability, except the left-right mirror, which has
    probability 1/2:

    ===========  ==================================================  ===========================
    change       parameters                                          labels
    ===========  ==================================================  ===========================
    mirror       left-right, top-bottom                              two, 0 or 1
    scale        by :math:`2^{0.2 w}`, :math:`w \sim N(0, 1)`        :math:`w`
    turn         by :math:`\phi \sim U(-\pi, \pi)`                   :math:`\cos\phi - 1, \sin\phi`
    stretch      by :math:`2^{0.2 w}` along a direction              :math:`w \cos 2\psi,
                 :math:`\psi`, and its inverse across                w \sin 2\psi`
    shift        by :math:`w / 8` of the size, each axis             :math:`w_x, w_y`
    ===========  ==================================================  ===========================

    All changes form one affine map, applied by bilinear interpolation with reflected borders;
    images that are only mirrored keep their exact pixels. (The paper interpolates with a wavelet
    filter of 12 taps, which is a little sharper.)

    Arguments:
        probability: Probability of each change, in [0, 1].
    """

    probability: float = 0.12

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise InputError(
                f"probability must be in [0, 1], got {self.probability}; the published value is "
                "0.12."
            )

    @property
    def width(self) -> int:
        return 9

    def __call__(self, x: Tensor, streams: Streams, draw: int = 0) -> tuple[Tensor, Tensor]:
        if x.ndim != 4:
            raise InputError(
                f"GeometricAugmentation requires images (C, H, W), got {tuple(x.shape[1:])}."
            )
        u = streams.uniform((7,), Purpose.AUGMENT, 2 * draw, torch.float32)
        w = streams.normal((4,), Purpose.AUGMENT, 2 * draw + 1, torch.float32)
        happens = (u[:, :5] < self.probability).to(w)
        mirror_x = (u[:, 5] < 0.5).to(w)
        mirror_y, scale = happens[:, 0], happens[:, 1] * w[:, 0]
        turn = happens[:, 2] * math.pi * (2 * u[:, 6] - 1)
        # Signs and sizes are independent: u / probability is uniform where the change happens.
        share = (u[:, 3] / max(self.probability, 1e-6)).clamp(0, 1)
        stretch, direction = happens[:, 3] * w[:, 1], 2 * math.pi * share
        shift = happens[:, 4:5] * w[:, 2:4]

        matrix = _turned(turn) @ _scaled(2 ** (0.2 * scale), 2 ** (0.2 * scale))
        half = _turned(0.5 * direction)
        matrix = matrix @ half @ _scaled(2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)) @ half.mT
        moved = _warped(_mirrored(x, mirror_x, mirror_y), matrix, shift / 8)
        labels = torch.stack(
            (
                *(mirror_x, mirror_y, scale, turn.cos() - 1, turn.sin()),
                *(stretch * direction.cos(), stretch * direction.sin(), shift[:, 0], shift[:, 1]),
            ),
            dim=1,
        )
        return moved, labels


def _turned(angle: Tensor) -> Tensor:
    """Rotation matrices ``(B, 2, 2)``."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1)


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    """Diagonal matrices ``(B, 2, 2)``."""
    return torch.diag_embed(torch.stack((x, y), 1))


def _mirrored(x: Tensor, left_right: Tensor, top_bottom: Tensor) -> Tensor:
    for flag, axis in ((left_right, -1), (top_bottom, -2)):
        x = torch.where(flag.reshape(-1, 1, 1, 1) > 0, x.flip(axis), x)
    return x


def _warped(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Maps pixels by p -> matrix p + 2 shift, in coordinates of [-1, 1] of the shorter side."""
    height, width = x.shape[-2:]
    # A rotation is rigid in pixels, not in the unit square of an oblong image.
    size = torch.ones(2, device=x.device)
    size[0] *= width / min(height, width)
    size[1] *= height / min(height, width)
    inverse = torch.linalg.inv_ex(matrix).inverse * size / size.unsqueeze(1)
    offset = -(inverse @ (2 * shift).unsqueeze(2))
    grid = affine_grid(torch.cat((inverse, offset), 2), list(x.shape), align_corners=False)
    moved = grid_sample(
        x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    identity = torch.eye(2, device=x.device)
    still = ((matrix == identity).flatten(1).all(1) & (shift == 0).all(1)).reshape(-1, 1, 1, 1)
    return torch.where(still, x, moved.to(x.dtype))
