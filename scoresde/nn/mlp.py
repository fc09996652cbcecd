r"""Residual multi-layer perceptron for data of any shape; best for vectors.

Each block normalises the state, scales and shifts it depending on the noise level (FiLM), and adds
its output to the state:

.. math:: h \leftarrow h + W_2 \, \mathrm{SiLU}(W_1 ((1 + a(c)) \odot \mathrm{LN}(h) + b(c)))

References:
    Perez et al., *FiLM: visual reasoning with a general conditioning layer*, 2018,
    https://arxiv.org/abs/1709.07871.
    He et al., *Identity mappings in deep residual networks*, 2016,
    https://arxiv.org/abs/1603.05027.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import silu

from scoresde.errors import InputError
from scoresde.nn.basics import check_dropout, check_whole, check_wholes, initialise
from scoresde.nn.embedding import ConditionalNetwork, Conditioning, Embedding, FourierEmbedding
from scoresde.nn.features import FourierFeatures, check_features
from scoresde.recipe import describable

_EMBEDDED = 64


@describable
class MLP(ConditionalNetwork):
    """Residual multi-layer perceptron that starts as the zero function.

    Arguments:
        shape: The shape of one example, without the batch axis; a number for a vector.
        width: The width of the residual state.
        depth: The number of residual blocks.
        dropout: The fraction of each block's hidden units dropped in training, in [0, 1).
        embedding: Embedding of the noise label. If None, ``FourierEmbedding(64)`` is used, which
            suits labels of order 1.
        conditions: The name and the number of entries of each further condition, a vector
            ``(B, n)`` passed to ``forward`` by name. A row of NaN, or a missing condition, is
            "none".
        classes: The number of classes of the condition ``label``, int64 ``(B,)``, -1 for none. If
            0, no label is accepted.
        outputs: The number of outputs ``(B, outputs)``, such as the number of classes of a
            classifier. If None, the output has the shape of the data.
        output_heads: The number of outputs of the shape of the data, concatenated along the
            channels: 1, or 2 if the variance is learned too
            (:class:`~scoresde.likelihood.LearnedRange`).
        features: Additional features of the input, such as :class:`FourierFeatures`; none by
            default.

    Raises:
        InputError: If an argument is out of its range, or later an input has another shape.

    Example:
        >>> import torch
        >>> MLP(2, width=16)(torch.ones(3, 2), torch.zeros(3)).shape
        torch.Size([3, 2])
    """

    conditioning: Conditioning

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        depth: int = 4,
        dropout: float = 0.0,
        embedding: Embedding | None = None,
        conditions: Mapping[str, int] | None = None,
        classes: int = 0,
        outputs: int | None = None,
        output_heads: int = 1,
        features: FourierFeatures | None = None,
    ) -> None:
        super().__init__()
        if check_whole("output_heads", output_heads) > 1 and outputs is not None:
            raise InputError(f"output_heads must be 1 with outputs={outputs}, got {output_heads}.")
        self.features = check_features(features)
        self.outputs = None if outputs is None else check_whole("outputs", outputs)
        self.shape = check_wholes("shape", [shape] if isinstance(shape, int) else shape)
        check_whole("width", width)
        check_whole("depth", depth)
        size = math.prod(self.shape)
        self.output_heads = output_heads
        embedding = embedding or FourierEmbedding(_EMBEDDED)
        self.conditioning = Conditioning(embedding, width, conditions=conditions, classes=classes)
        seen = size if features is None else features.channels(size)
        self.linear_in = initialise(nn.Linear(seen, width))
        self.blocks = nn.ModuleList(PerceptronBlock(width, width, dropout) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = initialise(nn.Linear(width, outputs or output_heads * size), scale=0.0)

    def forward(self, x: Tensor, c: Tensor, **conditions: Tensor) -> Tensor:
        """Returns an output of the shape of the data, or ``(B, outputs)``, for labels ``(B,)``.

        Two heads have twice the channels.
        """
        if x.shape[1:] != self.shape:
            raise InputError(
                f"Examples must have shape {self.shape} for this network, got "
                f"{tuple(x.shape[1:])}."
            )
        told = self.conditioning(c, x, conditions)
        seen = x if self.features is None else self.features(x)
        h = self.linear_in(seen.reshape(-1, self.linear_in.in_features))
        for block in self.blocks:
            h = block(h, told)
        out = self.linear_out(silu(self.norm_out(h)))
        if self.outputs:
            return out
        heads = out.reshape(len(x), self.output_heads, *self.shape)
        return heads.flatten(1, 2) if self.shape else heads[:, 0]


class PerceptronBlock(nn.Module):
    """One residual block, from states ``(B, width)`` and features ``(B, features)`` to states.

    Arguments:
        width: The width of the state.
        features: The number of features of the noise level.
        dropout: The fraction of hidden units dropped in training, in [0, 1).
    """

    def __init__(self, width: int, features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = initialise(nn.Linear(features, 2 * width))
        self.linear_in = initialise(nn.Linear(width, width))
        self.dropout = nn.Dropout(check_dropout(dropout))
        self.linear_out = initialise(nn.Linear(width, width))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        a, b = self.modulation(features).chunk(2, dim=1)
        h = self.linear_in((1 + a) * self.norm(x) + b)
        return x + self.linear_out(self.dropout(silu(h)))
