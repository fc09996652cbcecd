r"""Pyramids: the image itself, at every size, beside the states of a U-Net.

On the way down an input pyramid shows each level the image at its own size; on the way up an
output pyramid lets each level paint its own size of the result. Both give gradients a short way.

References:
    Karras et al., *Analyzing and improving the image quality of StyleGAN*, 2020,
    https://arxiv.org/abs/1912.04958 (section 4.1 and figure 7: input/output skips and residual
    nets).
    Song et al., https://arxiv.org/abs/2011.13456 (appendix H, "progressive growing").
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scoresde.nn.basics import add
from scoresde.nn.blocks import Head, Parts


@dataclass(frozen=True)
class Combination(ABC):
    """Abstract: joins a state made from the image to the state of a level."""

    @abstractmethod
    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        """Returns a state for two of ``(B, C, *)``."""

    @abstractmethod
    def channels(self, channels: int) -> int:
        """Returns the number of channels that C become."""


@dataclass(frozen=True)
class Sum(Combination):
    """The sum of the two."""

    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        return image + h

    def channels(self, channels: int) -> int:
        return channels


@dataclass(frozen=True)
class Concatenation(Combination):
    """One beside the other, with twice the channels."""

    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        return torch.cat((image, h), dim=1)

    def channels(self, channels: int) -> int:
        return 2 * channels


class InputLayer(nn.Module, ABC):
    """Abstract: gives the state of a new level what it needs to know of the image.

    Arguments:
        image: The number of channels of the pyramid behind it.
        channels: The number of channels of the state behind it.
    """

    def __init__(self, image: int, channels: int) -> None:
        super().__init__()
        self.image = image
        self.channels = channels

    @abstractmethod
    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state and the pyramid, at the same size, for ``image`` at twice the size."""


class InputPyramid(ABC):
    """Abstract: shows the image to every level on the way down."""

    @abstractmethod
    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        """Returns the layer behind one halving of the size.

        Arguments:
            image: The number of channels of the pyramid before it.
            channels: The number of channels of the state.
            parts: What builds layers.
        """


@dataclass(frozen=True)
class InputSkip(InputPyramid):
    """Every level is given the resampled image through a 1 x 1 convolution ("input skip").

    Arguments:
        combine: How it is joined to the state.
    """

    combine: Combination = field(default_factory=Sum)

    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        return InputSkipLayer(image, channels, parts, self.combine)


@dataclass(frozen=True)
class InputResidual(InputPyramid):
    """The image comes down through strided convolutions, and every level adds to it."""

    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        return InputResidualLayer(image, channels, parts)


class InputSkipLayer(InputLayer):
    """What :class:`InputSkip` does at one level."""

    def __init__(self, image: int, channels: int, parts: Parts, combine: Combination) -> None:
        super().__init__(image, combine.channels(channels))
        self.down = parts.resampling.down()
        self.conv = parts.point(image, channels)
        self.combine = combine

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.down(image)
        return self.combine(self.conv(image), h), image


class InputResidualLayer(InputLayer):
    """What :class:`InputResidual` does at one level."""

    def __init__(self, image: int, channels: int, parts: Parts) -> None:
        super().__init__(channels, channels)
        self.down = parts.down_conv(image, channels)
        self.rescale = parts.rescale

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = add(self.down(image), h, self.rescale)
        return h, h


class OutputLayer(nn.Module, ABC):
    """Abstract: what one level paints."""

    @abstractmethod
    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state and the pyramid, at the same size, for ``image`` at half the size."""


class OutputPyramid(ABC):
    """Abstract: lets every level on the way up paint its own size of the result.

    Arguments:
        is_output: Whether the pyramid is the network's output; else it is one more state.
    """

    is_output: bool

    @abstractmethod
    def lowest(self, channels: int, image: int, parts: Parts) -> OutputLayer:
        """Returns the layer that starts the pyramid (it is given a state as ``image``, too).

        Arguments:
            channels: The number of channels of the state.
            image: The number of channels of the network's output.
            parts: What builds layers.
        """

    @abstractmethod
    def layer(self, below: int, channels: int, image: int, parts: Parts) -> OutputLayer:
        """Returns the layer of any other level.

        Arguments:
            below: The number of channels of the level below.
            channels: The number of channels of the state.
            image: The number of channels of the network's output.
            parts: What builds layers.
        """


@dataclass(frozen=True)
class OutputSkip(OutputPyramid):
    """The output is the sum of one image from every level, resampled ("output skip")."""

    is_output = True

    def lowest(self, channels: int, image: int, parts: Parts) -> OutputLayer:
        return OutputStart(parts.head(channels, image, parts.init_scale))

    def layer(self, below: int, channels: int, image: int, parts: Parts) -> OutputLayer:
        return OutputSkipLayer(channels, image, parts)


@dataclass(frozen=True)
class OutputResidual(OutputPyramid):
    """A state comes up through convolutions, and every level adds to it."""

    is_output = False

    def lowest(self, channels: int, image: int, parts: Parts) -> OutputLayer:
        return OutputStart(parts.head(channels, channels))

    def layer(self, below: int, channels: int, image: int, parts: Parts) -> OutputLayer:
        return OutputResidualLayer(below, channels, parts)


class OutputStart(OutputLayer):
    """The lowest level of a pyramid."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return h, self.head(h)


class OutputSkipLayer(OutputLayer):
    """What :class:`OutputSkip` does at one level."""

    def __init__(self, channels: int, image: int, parts: Parts) -> None:
        super().__init__()
        self.up = parts.resampling.up()
        self.head = parts.head(channels, image, parts.init_scale)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return h, self.up(image) + self.head(h)


class OutputResidualLayer(OutputLayer):
    """What :class:`OutputResidual` does at one level."""

    def __init__(self, below: int, channels: int, parts: Parts) -> None:
        super().__init__()
        self.up = parts.up_conv(below, channels)
        self.rescale = parts.rescale

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = add(self.up(image), h, self.rescale)
        return h, h
