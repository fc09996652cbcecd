"""Building blocks of a U-Net, and the settings shared by the blocks of one network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scoresde.errors import InputError
from scoresde.nn.basics import (
    CONVOLUTIONS,
    Groups,
    add,
    check_dropout,
    check_flag,
    check_whole,
    check_wholes,
    initialise,
)
from scoresde.nn.resampling import Resampling


class ResidualBlock(nn.Module):
    r"""A residual block; the noise level enters as a shift of its channels.

    .. math::
        x' = \mathrm{conv}_{1 \times 1}(R(x)), \qquad
        h = \mathrm{conv}(R(\phi(\mathrm{GN}(x)))) + W c, \qquad
        y = \frac{x' + \mathrm{conv}(\phi(\mathrm{GN}(h)))}{\sqrt 2}

    :math:`R` changes the resolution (BigGAN), or is the identity (DDPM). The 1 x 1 convolution is
    used only if the channels or the resolution change. The last convolution starts at zero.

    Arguments:
        source: The number of channels of the input.
        channels: The number of channels of the output.
        features: The number of features of the noise level. If None, the block does not use it.
        dropout: The fraction of the hidden state dropped in training, in [0, 1).
        resample: Layer that changes the resolution, such as :class:`Downsample`. If None, the
            resolution is kept.
        norm: The normalisation. If None, ``Groups()`` is used.
        activation: The activation :math:`\phi`. If None, SiLU is used.
        rescale: Whether the sum is divided by the square root of two.
        init_scale: The initial variance scale of the last convolution.
        dims: The number of axes besides batch and channels: 1, 2 or 3.
    """

    def __init__(
        self,
        source: int,
        channels: int,
        features: int | None,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
        norm: Groups | None = None,
        activation: nn.Module | None = None,
        rescale: bool = True,
        init_scale: float = 0.0,
        dims: int = 2,
    ) -> None:
        super().__init__()
        norm = norm or Groups()
        self.rescale = rescale
        self.resample = nn.Identity() if resample is None else resample
        self.activation = activation or nn.SiLU()
        self.norm_in = norm(source)
        self.conv_in = conv3x3(source, channels, dims=dims)
        self.shift = None if features is None else initialise(nn.Linear(features, channels))
        self.norm_out = norm(channels)
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.conv_out = conv3x3(channels, channels, init_scale, dims)
        same = source == channels and resample is None
        point = CONVOLUTIONS[dims]
        self.shortcut = nn.Identity() if same else initialise(point(source, channels, 1))

    def forward(self, x: Tensor, features: Tensor | None) -> Tensor:
        """Returns states ``(B, C', *)`` for states ``(B, C, *)`` and the features."""
        h = self.conv_in(self.resample(self.activation(self.norm_in(x))))
        if self.shift is not None:
            shift = self.shift(features)
            h = h + shift.reshape(*shift.shape, *(1,) * (h.ndim - 2))
        h = self.conv_out(self.dropout(self.activation(self.norm_out(h))))
        return add(self.shortcut(self.resample(x)), h, self.rescale)


class Attention(nn.Module):
    r"""Self-attention over all positions of a signal, image or volume, as a residual block.

    .. math:: y = \frac{x + W \, \mathrm{softmax}(q k^\top / \sqrt{d}) \, v}{\sqrt 2}

    The fused kernels of torch support one derivative, in reverse mode. For a forward-mode or
    second derivative, call the network within ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Arguments:
        channels: The number of channels.
        heads: The number of heads; it must divide the channels, with :math:`d` channels per head.
        norm: The normalisation. If None, ``Groups()`` is used.
        rescale: Whether the sum is divided by the square root of two.
        init_scale: The initial variance scale of the last layer.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        norm: Groups | None = None,
        rescale: bool = True,
        init_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = check_whole("heads", heads)
        if channels % heads:
            raise InputError(
                f"heads must divide the {channels} channels of an attention layer, got {heads}; "
                "use heads=1, or a head_width that divides the channels."
            )
        self.rescale = rescale
        self.norm = (norm or Groups())(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        nn.init.zeros_(self.qkv.bias)
        for weight in self.qkv.weight.chunk(3):  # as three separate layers, initially small
            nn.init.xavier_uniform_(weight, gain=math.sqrt(0.1))
        self.out = initialise(nn.Linear(channels, channels), init_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Returns states ``(B, C, *)`` of the shape of its input."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = scaled_dot_product_attention(q, k, v)  # (B, heads, HW, d)
        h = self.out(h.transpose(1, 2).flatten(2)).transpose(1, 2)
        return add(x, h.reshape(x.shape), self.rescale)


@dataclass(frozen=True)
class AttentionLayout:
    """Positions of attention in a U-Net besides the middle, and the heads of every attention.

    Arguments:
        levels: The levels with attention; 0 is the full resolution. A (3, 32, 32) image is 16 x 16
            at level 1.
        heads: The number of heads; it must divide the channels where attention is.
        head_width: The number of channels of each head, used instead of ``heads``. If None,
            ``heads`` is used.
        after_each: Whether attention follows each block of the up path, as in Ho et al. If False,
            it follows only the last block of a level, as in Song et al.

    Raises:
        InputError: If a value is out of range.
    """

    levels: Sequence[int] = (1,)
    heads: int = 1
    head_width: int | None = None
    after_each: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_wholes("attention", self.levels, least=0))
        check_whole("attention.heads", self.heads)
        check_whole("attention.head_width", 1 if self.head_width is None else self.head_width)
        check_flag("attention.after_each", self.after_each)

    @staticmethod
    def of(
        given: "AttentionLayout | Sequence[int] | Mapping[str, Any] | None",
    ) -> "AttentionLayout":
        """Converts levels alone, or a mapping of fields, to a layout."""
        match given:
            case AttentionLayout():
                return given
            case None:
                return AttentionLayout()
            case Mapping():
                return AttentionLayout(**given)
        return AttentionLayout(given)

    def heads_of(self, channels: int) -> int:
        """Returns the number of heads for a number of channels."""
        return max(1, channels // self.head_width) if self.head_width else self.heads


class Head(nn.Module):
    """Converts a state to an image or another state: normalisation, activation, convolution.

    Arguments:
        norm: The normalisation of the state's channels.
        activation: The activation.
        conv: The convolution.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.conv = conv

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(self.activation(self.norm(h)))


@dataclass(frozen=True)
class Parts:
    """Settings shared by all parts of one U-Net, and the builder of these parts.

    Arguments:
        features: The number of features of the noise level, or None.
        layout: The heads of attention.
        dropout: The fraction dropped in residual blocks.
        norm: The normalisation.
        activation: The activation.
        resampling: The resampling between sizes.
        rescale: Whether sums are divided by the square root of two.
        init_scale: The initial variance scale of the last layer of each branch.
        dims: The number of axes besides batch and channels.
    """

    features: int | None
    layout: AttentionLayout
    dropout: float
    norm: Groups
    activation: nn.Module
    resampling: Resampling
    rescale: bool
    init_scale: float
    dims: int = 2

    def block(
        self, source: int, channels: int, resample: nn.Module | None = None
    ) -> ResidualBlock:
        """Returns a residual block."""
        style = (self.norm, self.activation, self.rescale, self.init_scale, self.dims)
        return ResidualBlock(source, channels, self.features, self.dropout, resample, *style)

    def attention(self, channels: int) -> Attention:
        """Returns an attention block."""
        heads = self.layout.heads_of(channels)
        return Attention(channels, heads, self.norm, self.rescale, self.init_scale)

    def head(self, channels: int, image: int, scale: float = 1.0) -> Head:
        """Returns a head from ``channels`` to ``image`` channels."""
        conv = conv3x3(channels, image, scale, self.dims)
        return Head(self.norm(channels), self.activation, conv)

    def point(self, source: int, channels: int) -> nn.Module:
        """Returns a convolution with kernel size 1."""
        return initialise(CONVOLUTIONS[self.dims](source, channels, 1))

    def down_conv(self, source: int, channels: int) -> nn.Module:
        """Returns a convolution that halves the size."""
        return self.resampling.down_conv(source, channels, *self._axes)

    def up_conv(self, source: int, channels: int) -> nn.Module:
        """Returns a convolution that doubles the size."""
        return self.resampling.up_conv(source, channels, *self._axes)

    @property
    def _axes(self) -> tuple[int, ...]:
        # Passed only if it is not 2: a resampling may support only images.
        return () if self.dims == 2 else (self.dims,)


class Transition(ABC):
    """Base class for transitions between the levels of a U-Net."""

    @abstractmethod
    def down(self, channels: int, parts: Parts) -> nn.Module:
        """Returns a layer that takes a state and features, and halves the size."""

    @abstractmethod
    def up(self, channels: int, parts: Parts) -> nn.Module:
        """Returns a layer that takes a state and features, and doubles the size."""


@dataclass(frozen=True)
class BigGANTransition(Transition):
    """Transition inside a residual block (DDPM++, NCSN++).

    References:
        Brock et al. 2019, https://arxiv.org/abs/1809.11096 (appendix B).
    """

    def down(self, channels: int, parts: Parts) -> nn.Module:
        return parts.block(channels, channels, parts.resampling.down())

    def up(self, channels: int, parts: Parts) -> nn.Module:
        return parts.block(channels, channels, parts.resampling.up())


@dataclass(frozen=True)
class DDPMTransition(Transition):
    """Transition between residual blocks (DDPM).

    Arguments:
        convolution: Whether the transition includes a 3 x 3 convolution.
    """

    convolution: bool = True

    def down(self, channels: int, parts: Parts) -> nn.Module:
        wide = parts.down_conv(channels, channels) if self.convolution else parts.resampling.down()
        return Between(wide)

    def up(self, channels: int, parts: Parts) -> nn.Module:
        wide = parts.up_conv(channels, channels) if self.convolution else parts.resampling.up()
        return Between(wide)


class Between(nn.Module):
    """A layer between residual blocks, without the noise level.

    Arguments:
        layer: A layer of states ``(B, C, *)``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor, features: Tensor | None) -> Tensor:
        return self.layer(h)


def conv3x3(source: int, channels: int, scale: float = 1.0, dims: int = 2) -> nn.Module:
    """Returns a convolution with kernel size 3 along each axis that keeps the size.

    Arguments:
        source: The number of channels of the input.
        channels: The number of channels of the output.
        scale: The initial variance scale of its weights.
        dims: The number of axes besides batch and channels: 1, 2 or 3.
    """
    return initialise(CONVOLUTIONS[dims](source, channels, 3, padding=1), scale)
