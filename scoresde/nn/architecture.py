"""The architecture of a U-Net: of what kind its blocks and levels are, whatever their sizes."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from scoresde.errors import InputError
from scoresde.nn.basics import Groups, check_flag, check_whole
from scoresde.nn.blocks import BigGANTransition, Transition
from scoresde.nn.features import FourierFeatures
from scoresde.nn.pyramids import InputPyramid, OutputPyramid
from scoresde.nn.resampling import BoxResampling, Resampling


@dataclass(frozen=True)
class Architecture:
    """The blocks and levels of a U-Net; those of DDPM++ by default.

    Arguments:
        transition: How one level leads to the next.
        resampling: How sizes change.
        norm: The normalisation.
        activation: The activation, one for all; ``None``: SiLU.
        rescale: Whether sums of states are divided by the root of two.
        init_scale: The variance scale, at first, of the layers that end a residual branch, and of
            the last one; 0 makes them exactly zero.
        input_pyramid: How levels are shown the image itself, such as ``InputSkip()`` or
            ``InputResidual()``; ``None``: only the first one is.
        output_pyramid: How levels paint the output, such as ``OutputSkip()`` or
            ``OutputResidual()``; ``None``: only the last one does.
        conditional: Whether the blocks are told the noise label.
        features: What of the input is shown besides, such as ``FourierFeatures(256)``; ``None``:
            nothing.
        output_heads: The number of outputs of the shape of the data, joined at the channels: 1,
            or 2 where the variance is learned too (:class:`~scoresde.likelihood.LearnedRange`).

    Raises:
        InputError: If a value is of another type or out of its range.
    """

    transition: Transition = field(default_factory=BigGANTransition)
    resampling: Resampling = field(default_factory=BoxResampling)
    norm: Groups = field(default_factory=Groups)
    activation: nn.Module | None = None
    rescale: bool = True
    init_scale: float = 0.0
    input_pyramid: InputPyramid | None = None
    output_pyramid: OutputPyramid | None = None
    conditional: bool = True
    features: FourierFeatures | None = None
    output_heads: int = 1

    def __post_init__(self) -> None:
        self._check("transition", Transition, "DDPMTransition()")
        self._check("resampling", Resampling, "FIRResampling()")
        self._check("norm", Groups, "Groups()")
        self._check("activation", nn.Module | None, "torch.nn.SiLU()")
        self._check("input_pyramid", InputPyramid | None, "InputSkip()")
        self._check("output_pyramid", OutputPyramid | None, "OutputSkip()")
        self._check("features", FourierFeatures | None, "FourierFeatures(256)")
        check_flag("architecture.rescale", self.rescale)
        check_flag("architecture.conditional", self.conditional)
        heads = check_whole("architecture.output_heads", self.output_heads)
        if heads > 1 and self.output_pyramid is not None:
            raise InputError(
                f"architecture.output_heads must be 1 with an output pyramid, got {heads}."
            )
        if not isinstance(self.init_scale, int | float) or not 0 <= self.init_scale < math.inf:
            raise InputError(
                "architecture.init_scale must be non-negative and finite, got "
                f"{self.init_scale!r}; 0 and 1 are usual."
            )

    def _check(self, name: str, kind: Any, example: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            raise InputError(
                f"architecture.{name} must be an object such as {example}, got {value!r}."
            )
