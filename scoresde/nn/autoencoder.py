"""Encoder and decoder networks between data and latents, for images and for vectors.

They take no noise level, since an autoencoder sees clean examples. The pair for images has the
architecture of the published ``AutoencoderKL``: the down path of a U-Net, and the up path without
skip connections.

References:
    Rombach et al., *High-resolution image synthesis with latent diffusion models*, 2022,
    https://arxiv.org/abs/2112.10752 (appendix E).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.basics import CONVOLUTIONS, Groups, check_whole, check_wholes, initialise
from scoresde.nn.blocks import AttentionLayout, DDPMTransition, Head, Parts, conv3x3
from scoresde.nn.resampling import BoxResampling
from scoresde.nn.unet import DownLevel, Middle, padded
from scoresde.recipe import describable


class _Convolutional(nn.Module):
    """Base class for the encoder and the decoder of images."""

    def __init__(
        self,
        shape: Sequence[int],
        channels: int,
        widths: Sequence[int],
        blocks: int,
        dropout: float,
        norm: Groups | None,
    ) -> None:
        super().__init__()
        self.shape = check_wholes("shape", shape)
        self.channels = check_whole("channels", channels)
        self.widths = check_wholes("widths", widths)
        dims = len(self.shape) - 1
        if dims not in (1, 2, 3):
            raise InputError(
                f"shape must be (C, L), (C, H, W) or (C, D, H, W), got {self.shape}; use Dense "
                "for vectors."
            )
        check_whole("blocks", blocks)
        self.parts = Parts(
            features=None,
            layout=AttentionLayout(),
            dropout=dropout,
            norm=norm or Groups(),
            activation=nn.SiLU(),
            resampling=BoxResampling(),
            rescale=False,
            init_scale=1.0,
            dims=dims,
        )

    @property
    def small(self) -> tuple[int, ...]:
        """The sizes of the latents: those of the data, halved between levels and rounded up."""
        halves = 2 ** (len(self.widths) - 1)
        return tuple(-(-n // halves) for n in self.shape[1:])

    def point(self, channels: int, there: bool) -> nn.Module:
        """Returns a convolution with kernel size 1 if ``there``, otherwise the identity."""
        layer = CONVOLUTIONS[len(self.shape) - 1]
        return initialise(layer(channels, channels, 1)) if there else nn.Identity()

    def check(self, x: Tensor, shape: Sequence[int]) -> None:
        """Checks the shape of an input."""
        if tuple(x.shape[1:]) != tuple(shape):
            raise InputError(
                f"Examples must have shape {tuple(shape)} for this network, got "
                f"{tuple(x.shape[1:])}."
            )


@describable
class ImageEncoder(_Convolutional):
    """Encoder from images to smaller images of latents, ``(B, C, *)`` to ``(B, c, *)``.

    Each level has residual blocks, and the size is halved between levels.

    Arguments:
        shape: The shape of one example: channels, then one to three axes.
        channels: The number of channels of the output, such as two per latent channel.
        widths: The number of channels of each level, from the full resolution.
        blocks: The number of residual blocks of a level, positive.
        dropout: The fraction of each block's hidden state dropped in training, in [0, 1).
        norm: The normalisation. If None, ``Groups()`` is used.
        mixed: Whether a convolution with kernel size 1 follows the output.

    Raises:
        InputError: If an argument is out of its range, or later an input has another shape.

    Example:
        >>> import torch
        >>> ImageEncoder((1, 8, 8), channels=4, widths=[8, 8])(torch.ones(3, 1, 8, 8)).shape
        torch.Size([3, 4, 4, 4])
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        dropout: float = 0.0,
        norm: Groups | None = None,
        mixed: bool = False,
    ) -> None:
        super().__init__(shape, channels, widths, blocks, dropout, norm)
        parts, widths = self.parts, self.widths
        self.conv_in = conv3x3(self.shape[0], widths[0], dims=parts.dims)
        steps = [DDPMTransition()] * (len(widths) - 1) + [None]
        self.down = nn.ModuleList(
            DownLevel(above, width, blocks, parts, lambda n: nn.Identity(), step)
            for above, width, step in zip([widths[0], *widths], widths, steps, strict=False)
        )
        self.middle = Middle(widths[-1], parts)
        self.head = parts.head(widths[-1], channels)
        self.mix = self.point(channels, mixed)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output."""
        return (self.channels, *self.small)

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs ``(B, c, *)`` for images ``(B, C, *)``."""
        self.check(x, self.shape)
        h = self.conv_in(padded(x, len(self.widths)))
        for level in self.down:
            states, _ = level(h, h, None)
            h = states[-1]
        return self.mix(self.head(self.middle(h, None)))


class _UpLevel(nn.Module):
    """One level of a decoder: residual blocks, then upsampling by two."""

    def __init__(self, below: int, channels: int, blocks: int, parts: Parts, last: bool) -> None:
        super().__init__()
        sources = [below, *[channels] * blocks]
        self.blocks = nn.ModuleList(parts.block(source, channels) for source in sources)
        self.upsample = None if last else DDPMTransition().up(channels, parts)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, None)
        return h if self.upsample is None else self.upsample(h, None)


@describable
class ImageDecoder(_Convolutional):
    """Decoder from latents ``(B, c, *)`` to images ``(B, C, *)``, the counterpart of the encoder.

    Arguments:
        shape: The shape of one example: channels, then one to three axes.
        channels: The number of channels of the latents.
        widths: As in the encoder, from the full resolution.
        blocks: As in the encoder; each level has one block more.
        dropout: As in the encoder.
        norm: The normalisation. If None, ``Groups()`` is used.
        mixed: Whether a convolution with kernel size 1 comes first.

    Raises:
        InputError: If an argument is out of its range, or later an input has another shape.

    Example:
        >>> import torch
        >>> ImageDecoder((1, 8, 8), channels=2, widths=[8, 8])(torch.ones(3, 2, 4, 4)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int,
        widths: Sequence[int] = (32, 64),
        blocks: int = 1,
        dropout: float = 0.0,
        norm: Groups | None = None,
        mixed: bool = False,
    ) -> None:
        super().__init__(shape, channels, widths, blocks, dropout, norm)
        parts, down = self.parts, self.widths[::-1]
        self.mix = self.point(channels, mixed)
        self.conv_in = conv3x3(channels, down[0], dims=parts.dims)
        self.middle = Middle(down[0], parts)
        self.up = nn.ModuleList(
            _UpLevel(below, width, blocks, parts, i == len(down) - 1)
            for i, (below, width) in enumerate(zip([down[0], *down], down, strict=False))
        )
        self.head: Head = parts.head(down[-1], self.shape[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (self.channels, *self.small)

    def forward(self, z: Tensor) -> Tensor:
        """Returns images ``(B, C, *)`` for latents ``(B, c, *)``."""
        self.check(z, self.input_shape)
        h = self.middle(self.conv_in(self.mix(z)), None)
        for level in self.up:
            h = level(h)
        return self.head(h)[(..., *(slice(n) for n in self.shape[1:]))]


@describable
class Dense(nn.Module):
    r"""Multi-layer perceptron, ``(B, *shape)`` to ``(B, *output_shape)``, for any shapes.

    Without hidden layers it is the affine map :math:`x \mapsto W x + b`.

    Arguments:
        shape: The shape of one input.
        output_shape: The shape of one output.
        width: The number of units of a hidden layer, positive.
        depth: The number of hidden layers, at least 0.

    Raises:
        InputError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> Dense([3], [2, 2], width=8, depth=1)(torch.ones(5, 3)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(
        self, shape: Sequence[int], output_shape: Sequence[int], width: int = 128, depth: int = 2
    ) -> None:
        super().__init__()
        self.shape = check_wholes("shape", shape)
        self.output_shape = check_wholes("output_shape", output_shape)
        check_whole("width", width)
        hidden = [width] * check_whole("depth", depth, least=0)
        sizes = [math.prod(self.shape), *hidden, math.prod(self.output_shape)]
        layers: list[nn.Module] = []
        for source, target in pairwise(sizes):
            layers += [initialise(nn.Linear(source, target)), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.shape

    def forward(self, x: Tensor) -> Tensor:
        """Returns outputs for inputs."""
        return self.layers(x.flatten(1)).reshape(-1, *self.output_shape)
