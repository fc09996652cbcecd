r"""Pyramids: the image itself, at every size, next to the states of a U-Net.

In the down path, an input pyramid passes the image to each level at the size of the level. In the
up path, an output pyramid adds a contribution of each level, at its own size, to the result. Both
shorten the path of the gradients.

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
    """Base class for combinations of a state made from the image with the state of a level."""

    @abstractmethod
    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        """Returns the combination of two states ``(B, C, *)``."""

    @abstractmethod
    def channels(self, channels: int) -> int:
        """Returns the number of output channels for states of C channels."""


@dataclass(frozen=True)
class Sum(Combination):
    """The sum of the two."""

    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        return image + h

    def channels(self, channels: int) -> int:
        return channels


@dataclass(frozen=True)
class Concatenation(Combination):
    """The concatenation of the two, with twice the channels."""

    def __call__(self, image: Tensor, h: Tensor) -> Tensor:
        return torch.cat((image, h), dim=1)

    def channels(self, channels: int) -> int:
        return 2 * channels


class InputLayer(nn.Module, ABC):
    """Base class for layers that pass the image to the state of a new level.

    Arguments:
        image: The number of channels of the pyramid after it.
        channels: The number of channels of the state after it.
    """

    def __init__(self, image: int, channels: int) -> None:
        super().__init__()
        self.image = image
        self.channels = channels

    @abstractmethod
    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state and the pyramid, at the same size, for ``image`` at twice the size."""


class InputPyramid(ABC):
    """Base class for pyramids that pass the image to every level of the down path."""

    @abstractmethod
    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        """Returns the layer after one halving of the size.

        Arguments:
            image: The number of channels of the pyramid before it.
            channels: The number of channels of the state.
            parts: Builder of layers.
        """


@dataclass(frozen=True)
class InputSkip(InputPyramid):
    """Passes the resampled image to every level by a 1 x 1 convolution ("input skip").

    Arguments:
        combine: Combination with the state.
    """

    combine: Combination = field(default_factory=Sum)

    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        return InputSkipLayer(image, channels, parts, self.combine)


@dataclass(frozen=True)
class InputResidual(InputPyramid):
    """Passes the image down through strided convolutions; every level adds to it."""

    def layer(self, image: int, channels: int, parts: Parts) -> InputLayer:
        return InputResidualLayer(image, channels, parts)


class InputSkipLayer(InputLayer):
    """The layer of :class:`InputSkip` at one level."""

    def __init__(self, image: int, channels: int, parts: Parts, combine: Combination) -> None:
        super().__init__(image, combine.channels(channels))
        self.down = parts.resampling.down()
        self.conv = parts.point(image, channels)
        self.combine = combine

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.down(image)
        return self.combine(self.conv(image), h), image


class InputResidualLayer(InputLayer):
    """The layer of :class:`InputResidual` at one level."""

    def __init__(self, image: int, channels: int, parts: Parts) -> None:
        super().__init__(channels, channels)
        self.down = parts.down_conv(image, channels)
        self.rescale = parts.rescale

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = add(self.down(image), h, self.rescale)
        return h, h


class OutputLayer(nn.Module, ABC):
    """Base class for the contribution of one level to the output."""

    @abstractmethod
    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the state and the pyramid, at the same size, for ``image`` at half the size."""


class OutputPyramid(ABC):
    """Base class for pyramids that add the contribution of every level of the up path.

    Arguments:
        is_output: Whether the pyramid is the network's output. If False, it is an additional
            state.
    """

    is_output: bool

    @abstractmethod
    def lowest(self, channels: int, image: int, parts: Parts) -> OutputLayer:
        """Returns the layer that starts the pyramid; its ``image`` is a state, too.

        Arguments:
            channels: The number of channels of the state.
            image: The number of channels of the network's output.
            parts: Builder of layers.
        """

    @abstractmethod
    def layer(self, below: int, channels: int, image: int, parts: Parts) -> OutputLayer:
        """Returns the layer of any other level.

        Arguments:
            below: The number of channels of the level below.
            channels: The number of channels of the state.
            image: The number of channels of the network's output.
            parts: Builder of layers.
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
    """Passes a state up through convolutions; every level adds to it."""

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
    """The layer of :class:`OutputSkip` at one level."""

    def __init__(self, channels: int, image: int, parts: Parts) -> None:
        super().__init__()
        self.up = parts.resampling.up()
        self.head = parts.head(channels, image, parts.init_scale)

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return h, self.up(image) + self.head(h)


class OutputResidualLayer(OutputLayer):
    """The layer of :class:`OutputResidual` at one level."""

    def __init__(self, below: int, channels: int, parts: Parts) -> None:
        super().__init__()
        self.up = parts.up_conv(below, channels)
        self.rescale = parts.rescale

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = add(self.up(image), h, self.rescale)
        return h, h
