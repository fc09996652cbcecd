"""Architecture of a U-Net: the kinds of its blocks and levels, independent of their sizes."""

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
    """Kinds of blocks and levels of a U-Net; those of DDPM++ by default.

    Arguments:
        transition: Transition between levels.
        resampling: Resampling between sizes.
        norm: The normalisation.
        activation: The activation, the same everywhere. If None, SiLU is used.
        rescale: Whether sums of states are divided by the square root of two.
        init_scale: The initial variance scale of the last layer of each residual branch, and of
            the last layer of the network; 0 makes them exactly zero.
        input_pyramid: Pyramid that passes the image itself to each level, such as ``InputSkip()``
            or ``InputResidual()``. If None, only the first level receives it.
        output_pyramid: Pyramid through which each level contributes to the output, such as
            ``OutputSkip()`` or ``OutputResidual()``. If None, only the last level produces the
            output.
        conditional: Whether the blocks receive the noise label.
        features: Additional features of the input, such as ``FourierFeatures(256)``; none by
            default.
        output_heads: The number of outputs of the shape of the data, concatenated along the
            channels: 1, or 2 if the variance is learned too
            (:class:`~scoresde.likelihood.LearnedRange`).

    Raises:
        InputError: If a value has the wrong type or is out of range.
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
        self._check("transition", Transition, "a Transition such as DDPMTransition()")
        self._check("resampling", Resampling, "a Resampling such as FIRResampling()")
        self._check("norm", Groups, "a Groups such as Groups()")
        self._check("activation", nn.Module | None, "a Module such as torch.nn.SiLU()")
        self._check("input_pyramid", InputPyramid | None, "an InputPyramid such as InputSkip()")
        self._check(
            "output_pyramid", OutputPyramid | None, "an OutputPyramid such as OutputSkip()"
        )
        self._check("features", FourierFeatures | None, "features such as FourierFeatures(256)")
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
                f"{self.init_scale!r}; typical values are 0 and 1."
            )

    def _check(self, name: str, kind: Any, expected: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            none = ", or None" if isinstance(None, kind) else ""
            raise InputError(f"architecture.{name} must be {expected}{none}, got {value!r}.")
