"""Networks ``net(x, c, **cond)``: they know noisy data and a noise label, and no SDE.

Data ``x`` has the shape ``(B, *)``, the label ``c`` the shape ``(B,)``, and the output the shape
of the data. The label is any number that tells noise levels apart; see :class:`Embedding` for how
a network reads it.
"""

from scoresde.nn.embedding import Conditioning, Embedding, FourierEmbedding, PositionalEmbedding
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import Attention, Downsample, ResidualBlock, UNet, Upsample

__all__ = [
    "MLP",
    "Attention",
    "Conditioning",
    "Downsample",
    "Embedding",
    "FourierEmbedding",
    "PositionalEmbedding",
    "ResidualBlock",
    "UNet",
    "Upsample",
]
