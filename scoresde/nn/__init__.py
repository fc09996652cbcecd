"""Networks ``net(x, c, **cond)`` of noisy data and a noise label, independent of the SDE.

Data ``x`` has the shape ``(B, *)``, the label ``c`` the shape ``(B,)``, and the output the shape
of the data. The label is any number that distinguishes noise levels; :class:`Embedding` converts
it to features. Further conditions are passed by name; see :mod:`scoresde.nn.conditions`.
"""

from scoresde.nn.architecture import Architecture
from scoresde.nn.autoencoder import Dense, ImageDecoder, ImageEncoder
from scoresde.nn.basics import Groups
from scoresde.nn.blocks import (
    Attention,
    AttentionLayout,
    BigGANTransition,
    DDPMTransition,
    ResidualBlock,
    Transition,
)
from scoresde.nn.conditions import Conditions
from scoresde.nn.embedding import Conditioning, Embedding, FourierEmbedding, PositionalEmbedding
from scoresde.nn.encoder import Encoder
from scoresde.nn.features import FourierFeatures
from scoresde.nn.mlp import MLP
from scoresde.nn.pyramids import (
    Combination,
    Concatenation,
    InputPyramid,
    InputResidual,
    InputSkip,
    OutputPyramid,
    OutputResidual,
    OutputSkip,
    Sum,
)
from scoresde.nn.resampling import (
    BoxResampling,
    Downsample,
    FIRResampling,
    Resampling,
    Upsample,
)
from scoresde.nn.scaled import GeometricSigmas, ScaledBySigma
from scoresde.nn.unet import UNet

__all__ = [
    "MLP",
    "Architecture",
    "Attention",
    "AttentionLayout",
    "BigGANTransition",
    "BoxResampling",
    "Combination",
    "Concatenation",
    "Conditioning",
    "Conditions",
    "DDPMTransition",
    "Dense",
    "Downsample",
    "Embedding",
    "Encoder",
    "FIRResampling",
    "FourierEmbedding",
    "FourierFeatures",
    "GeometricSigmas",
    "Groups",
    "ImageDecoder",
    "ImageEncoder",
    "InputPyramid",
    "InputResidual",
    "InputSkip",
    "OutputPyramid",
    "OutputResidual",
    "OutputSkip",
    "PositionalEmbedding",
    "Resampling",
    "ResidualBlock",
    "ScaledBySigma",
    "Sum",
    "Transition",
    "UNet",
    "Upsample",
]
