r"""U-Net of DDPM, DDPM++ and NCSN++, for signals, images and volumes of any size.

The down path consists of levels, each half the size of the previous one; the up path reverses
them. Every block of the up path also receives a state of its size from the down path (skip
connection). Residual branches start at zero, receive the noise level as a shift of their channels,
and are added so that the variance is preserved,

.. math:: h \leftarrow \frac{h + F(h, c)}{\sqrt 2} .

Attention connects distant pixels, at the requested levels and always in the middle. Apart from
sizes, the published networks have these arguments; all except the last two are fields of
:class:`Architecture`:

==================  =====================  =================  ========================
argument            DDPM                   DDPM++             NCSN++ (VE)
==================  =====================  =================  ========================
``transition``      ``DDPMTransition()``   (default)          (default)
``resampling``      (default)              (default)          ``FIRResampling()``
``rescale``         ``False``              (default)          (default)
``norm``            ``Groups(32, 1)``      (default)          (default)
``input_pyramid``   (none)                 (none)             ``InputResidual()``
``embedding``       positional             positional         Fourier, of log sigma
``centre``          (no)                   (no)               ``True``
==================  =====================  =================  ========================

NCSN++ for VE is also wrapped in :class:`ScaledBySigma`; at 256 x 256 and above it has
``InputSkip()`` and ``OutputSkip()``. All of them are in ``conf/network``.

On a CPU it runs about a tenth faster as ``net.to(memory_format=torch.channels_last)``, with the
same results.

References:
    Ho et al., *Denoising diffusion probabilistic models*, 2020, https://arxiv.org/abs/2006.11239
    (appendix B).
    Song et al., *Score-based generative modeling through stochastic differential equations*,
    2021, https://arxiv.org/abs/2011.13456 (section 4.4 and appendix H).
    Brock et al., *Large scale GAN training for high fidelity natural image synthesis*, 2019,
    https://arxiv.org/abs/1809.11096 (appendix B, the residual block).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.architecture import Architecture
from scoresde.nn.basics import check_flag, check_whole, check_wholes
from scoresde.nn.blocks import AttentionLayout, Parts, Transition, conv3x3
from scoresde.nn.conditions import ImageConditions, check_images
from scoresde.nn.embedding import ConditionalNetwork, Conditioning, Embedding, FourierEmbedding
from scoresde.nn.pyramids import InputLayer, InputPyramid, OutputLayer, OutputPyramid
from scoresde.recipe import accepts_moved, describable

_LEAST_WIDTH = 4


@accepts_moved
@describable
class UNet(ConditionalNetwork):
    """U-Net that starts as the zero function.

    Data may have one, two or three axes besides the channels. A network of L levels halves them
    L - 1 times. If a size is not divisible by 2^(L - 1), it is padded with zeros at its end, and
    the output is cropped; convolutions pad the borders with zeros anyway. Level l has ``width *
    multipliers[l]`` channels, ``blocks`` residual blocks in the down path and ``blocks + 1`` in
    the up path.

    Arguments:
        shape: The shape of one example: ``(C, L)`` of a signal, ``(C, H, W)`` of an image or
            ``(C, D, H, W)`` of a volume. Other sizes may be given later.
        width: The number of channels that the multipliers multiply, at least 4. Multiples of 8, or
            better 16, are fastest on a CPU.
        multipliers: One factor of the width for each level, from the full resolution down.
        blocks: The number of residual blocks at each level.
        attention: The levels with attention and its heads: an :class:`AttentionLayout`, the levels
            alone, such as ``(1, 2)``, or a mapping of fields, such as ``{"heads": 4}``. If None,
            ``AttentionLayout()`` is used.
        dropout: The fraction of each block's hidden state dropped in training, in [0, 1).
        embedding: Embedding of the noise label. If None, ``FourierEmbedding(width)`` is used,
            which suits labels of order 1.
        architecture: The kinds of blocks and levels; those of DDPM++ by default.
        centre: Whether images are in [0, 1] and are first rescaled to [-1, 1].
        conditions: The name and the number of entries of each further condition, a vector
            ``(B, n)`` passed to ``forward`` by name; or the shape ``(C', *)`` of an image of the
            size of the input, which is concatenated to it. A condition that is NaN throughout, or
            missing, is "none".
        classes: The number of classes of the condition ``label``, int64 ``(B,)``, -1 for none. If
            0, no label is accepted.

    Raises:
        InputError: If an argument is out of its range, or later an input has another shape.

    Example:
        >>> UNet((1, 8, 12), width=8, blocks=1)(torch.ones(3, 1, 8, 12), torch.zeros(3)).shape
        torch.Size([3, 1, 8, 12])
        >>> UNet((2, 15), width=8, blocks=1)(torch.ones(3, 2, 15), torch.zeros(3)).shape
        torch.Size([3, 2, 15])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: AttentionLayout | Sequence[int] | Mapping[str, Any] | None = AttentionLayout(),
        *,
        dropout: float = 0.0,
        embedding: Embedding | None = None,
        architecture: Architecture = Architecture(),
        centre: bool = False,
        conditions: Mapping[str, int | Sequence[int]] | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape = _check_shape(shape)
        dims = len(self.shape) - 1
        check_whole("width", width, least=_LEAST_WIDTH)
        check_whole("blocks", blocks)
        check_flag("centre", centre)
        if not isinstance(architecture, Architecture):
            raise InputError(
                "architecture must be an Architecture such as Architecture(), got "
                f"{architecture!r}."
            )
        widths = [width * m for m in check_wholes("multipliers", multipliers)]
        if not widths:
            raise InputError("multipliers must not be empty; the default is (1, 2).")
        self.levels = len(widths)
        layout = AttentionLayout.of(attention)
        self._check_levels(layout.levels)
        vectors, images = check_images(conditions, self.shape)
        if (vectors or classes) and not architecture.conditional:
            raise InputError(
                f"conditional=False accepts only image conditions, got conditions={vectors!r} and "
                f"classes={classes}; remove them, or set conditional=True."
            )
        features = 4 * width if architecture.conditional else None
        self.centre = centre
        self.architecture = architecture
        self.activation = architecture.activation or nn.SiLU()
        parts = Parts(
            features=features,
            layout=layout,
            dropout=dropout,
            norm=architecture.norm,
            activation=self.activation,
            resampling=architecture.resampling,
            rescale=architecture.rescale,
            init_scale=architecture.init_scale,
            dims=dims,
        )
        plan = _Plan(parts, architecture.transition, blocks, widths)

        self.conditioning = None
        if features is not None:
            embedding = embedding or FourierEmbedding(width + width % 2)
            self.conditioning = Conditioning(
                embedding, features, self.activation, vectors, classes
            )
        waves = architecture.features
        channels = self.shape[0] if waves is None else waves.channels(self.shape[0])
        self.conv_in = conv3x3(channels, width, dims=dims)
        down = plan.down(self.shape[0], width, architecture.input_pyramid)
        self.down = nn.ModuleList(down)
        self.middle = Middle(widths[-1], parts)
        painted = architecture.output_pyramid
        self.up = nn.ModuleList(plan.up(self.shape[0], down, painted))
        self.paints = painted is not None and painted.is_output
        if not self.paints:
            self.norm_out = parts.norm(widths[0])
            channels = architecture.output_heads * self.shape[0]
            self.conv_out = conv3x3(widths[0], channels, parts.init_scale, dims)
        parts.norm.make_exceptions(self)
        # Last, so the other weights start the same as without conditions.
        self.images = ImageConditions(images, width, dims) if images else None

    def forward(self, x: Tensor, c: Tensor, **conditions: Tensor) -> Tensor:
        """Returns an output with the shape ``(B, C, *)`` of the data, for labels ``(B,)``.

        Two heads have twice the channels.
        """
        self._check_input(x)
        given = dict(conditions)
        shown = self._shown(x, given)
        features = self._features(x, c, given)
        image = 2 * x - 1 if self.centre else x
        waves = self.architecture.features
        seen = padded(image if waves is None else waves(image), self.levels)
        image = padded(image, self.levels)
        skips = [sum(shown, start=self.conv_in(seen))]
        for level in self.down:
            states, image = level(skips[-1], image, features)
            skips += states
        h = image = self.middle(skips[-1], features)
        for level in self.up:
            h, image = level(h, image, skips, features)
        out = image if self.paints else self.conv_out(self.activation(self.norm_out(h)))
        return out if out.shape[2:] == x.shape[2:] else out[(..., *map(slice, x.shape[2:]))]

    def _shown(self, x: Tensor, conditions: dict[str, Tensor]) -> list[Tensor]:
        """Removes the images from the conditions; returns the initial contribution of each."""
        if self.images is None:
            return []
        return [
            layer(padded(self.images.joined(name, conditions.pop(name, None), x), self.levels))
            for name, layer in self.images.layers.items()
        ]

    def _features(self, x: Tensor, c: Tensor, conditions: dict[str, Tensor]) -> Tensor | None:
        if self.conditioning is not None:
            return self.conditioning(c, x, conditions)
        if conditions:
            raise InputError(
                "conditional=False accepts no conditions except the images in conditions, got "
                f"{', '.join(conditions)}."
            )
        return None

    def _check_levels(self, levels: Sequence[int]) -> None:
        if levels and max(levels) >= self.levels:
            raise InputError(
                f"attention levels must be 0 (full resolution) to {self.levels - 1} with "
                f"{self.levels} multipliers, got {levels}."
            )

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != len(self.shape) + 1 or x.shape[1] != self.shape[0]:
            axes = ", ".join("DHW"[-n:] if (n := len(self.shape) - 1) > 1 else "L")
            raise InputError(
                f"x must have shape (B, {self.shape[0]}, {axes}) for this network, got "
                f"{tuple(x.shape)}."
            )


class DownLevel(nn.Module):
    """One level of the down path: residual blocks, each followed by attention, then halving.

    Arguments:
        above: The number of channels that come from the level above.
        channels: The number of channels of this level.
        blocks: The number of residual blocks.
        parts: Builder of blocks.
        attend: Function that builds the layer after a residual block, given the number of
            channels.
        transition: Transition to the next level. If None, this is the last level, and the size is
            kept.
        pyramid: Pyramid that passes the image to the next level, or None.
    """

    def __init__(
        self,
        above: int,
        channels: int,
        blocks: int,
        parts: Parts,
        attend: Callable[[int], nn.Module],
        transition: Transition | None = None,
        pyramid: InputLayer | None = None,
    ) -> None:
        super().__init__()
        self.above = above
        sources = [above, *[channels] * (blocks - 1)]
        self.blocks = nn.ModuleList(parts.block(source, channels) for source in sources)
        self.attentions = nn.ModuleList(attend(channels) for _ in sources)
        self.downsample = None if transition is None else transition.down(channels, parts)
        self.pyramid = pyramid

    def forward(
        self, h: Tensor, image: Tensor, features: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the states for the skip connections (the last is the output) and the image."""
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, features))
            skips.append(h)
        if self.downsample is not None:
            h = self.downsample(h, features)
            if self.pyramid is not None:
                h, image = self.pyramid(h, image)
            skips.append(h)
        return skips, image


class Middle(nn.Module):
    """The middle at the lowest resolution: block, attention, block.

    Arguments:
        channels: The number of channels.
        parts: Builder of blocks and attention.
    """

    def __init__(self, channels: int, parts: Parts) -> None:
        super().__init__()
        self.block_in = parts.block(channels, channels)
        self.attention = parts.attention(channels)
        self.block_out = parts.block(channels, channels)

    def forward(self, h: Tensor, features: Tensor | None) -> Tensor:
        return self.block_out(self.attention(self.block_in(h, features)), features)


class UpLevel(nn.Module):
    """One level of the up path: residual blocks, attention, the pyramid, then doubling.

    It has one block more than in the down path; the last block takes the state from the level
    above.

    Arguments:
        below: The number of channels that come from the level below.
        above: The number of channels from the level above in the down path.
        channels: The number of channels of this level.
        blocks: The number of residual blocks in the down path.
        parts: Builder of blocks.
        attend: Function that builds the layer after the last block, given the number of channels.
        attend_early: Function that builds the layer after each earlier block.
        transition: Transition to the next level. If None, this is the last level, and the size is
            kept.
        pyramid: Contribution of the level to the output, or None.
    """

    def __init__(
        self,
        below: int,
        above: int,
        channels: int,
        blocks: int,
        parts: Parts,
        attend: Callable[[int], nn.Module],
        attend_early: Callable[[int], nn.Module],
        transition: Transition | None = None,
        pyramid: OutputLayer | None = None,
    ) -> None:
        super().__init__()
        sources, skips = [below, *[channels] * blocks], [*[channels] * blocks, above]
        self.blocks = nn.ModuleList(
            parts.block(source + skip, channels)
            for source, skip in zip(sources, skips, strict=True)
        )
        self.early_attentions = nn.ModuleList(attend_early(channels) for _ in range(blocks))
        self.attention = attend(channels)
        self.upsample = None if transition is None else transition.up(channels, parts)
        self.pyramid = pyramid

    def forward(
        self, h: Tensor, image: Tensor, skips: list[Tensor], features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the next state and the pyramid; pops its skips from the end of ``skips``."""
        attentions = [*self.early_attentions, self.attention]
        for block, attention in zip(self.blocks, attentions, strict=True):
            h = attention(block(torch.cat((h, skips.pop()), dim=1), features))
        if self.pyramid is not None:
            h, image = self.pyramid(h, image)
        return (h if self.upsample is None else self.upsample(h, features)), image


@dataclass(frozen=True)
class _Plan:
    """Layout of a network in levels."""

    parts: Parts
    transition: Transition
    blocks: int
    widths: Sequence[int]

    def attend(self, level: int, early: bool = False) -> Callable[[int], nn.Module]:
        """Returns the builder of the layer after a block; ``early``: a block before the last."""
        layout = self.parts.layout
        there = level in layout.levels and (layout.after_each or not early)
        return self.parts.attention if there else _nothing

    def down(self, image: int, width: int, pyramid: InputPyramid | None) -> list[DownLevel]:
        """Returns the levels of the down path, from the full resolution."""
        levels = []
        above, last = width, len(self.widths) - 1
        for i, channels in enumerate(self.widths):
            given = (above, channels, self.blocks, self.parts, self.attend(i))
            if i == last:
                levels.append(DownLevel(*given))
            elif pyramid is None:
                levels.append(DownLevel(*given, self.transition))
                above = channels
            else:
                layer = pyramid.layer(image, channels, self.parts)
                levels.append(DownLevel(*given, self.transition, layer))
                above, image = layer.channels, layer.image
        return levels

    def up(
        self, image: int, down: list[DownLevel], pyramid: OutputPyramid | None
    ) -> list[UpLevel]:
        """Returns the levels of the up path, from the lowest resolution."""
        levels, below = [], None
        for i in reversed(range(len(self.widths))):
            channels, layer = self.widths[i], None
            if pyramid is not None and below is None:
                layer = pyramid.lowest(channels, image, self.parts)
            elif pyramid is not None and below is not None:
                layer = pyramid.layer(below, channels, image, self.parts)
            levels.append(
                UpLevel(
                    channels if below is None else below,
                    down[i].above,
                    channels,
                    self.blocks,
                    self.parts,
                    self.attend(i),
                    self.attend(i, early=True),
                    self.transition if i > 0 else None,
                    layer,
                )
            )
            below = channels
        return levels


def padded(x: Tensor, levels: int) -> Tensor:
    """Pads the end of each axis with zeros until it can be halved between all levels."""
    divisor = 2 ** (levels - 1)
    missing = [-n % divisor for n in x.shape[2:]]
    if not any(missing):
        return x
    return nn.functional.pad(x, [n for end in reversed(missing) for n in (0, end)])


def _nothing(channels: int) -> nn.Module:
    """Returns the identity, for a block without attention."""
    return nn.Identity()


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    found = check_wholes("shape", shape)
    if len(found) not in (2, 3, 4):
        raise InputError(
            f"shape must be (C, L), (C, H, W) or (C, D, H, W), got {found}; use MLP (on the "
            "command line network=mlp) for data of another shape."
        )
    return found
