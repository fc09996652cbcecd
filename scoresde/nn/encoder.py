"""Network from an image to a vector: the down path of a U-Net, followed by a mean."""

from collections.abc import Sequence

from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.architecture import Architecture
from scoresde.nn.basics import check_whole, check_wholes, initialise
from scoresde.nn.blocks import AttentionLayout, Parts
from scoresde.nn.embedding import ConditionalNetwork, Conditioning, Embedding, FourierEmbedding
from scoresde.nn.unet import DownLevel, Middle, padded
from scoresde.recipe import describable


@describable
class Encoder(ConditionalNetwork):
    """Residual blocks that halve an image level by level, and the mean over the last level.

    It starts as the zero function.

    Arguments:
        shape: The shape of one example: channels, then one to three axes.
        outputs: The number of outputs, such as the number of classes.
        width: The number of channels of the first level, at least 4.
        multipliers: The channels of each level, as multiples of the width.
        blocks: The number of residual blocks of a level.
        dropout: The fraction dropped in residual blocks, in [0, 1).
        embedding: Embedding of the noise label. If None, ``FourierEmbedding(width)`` is used.

    Raises:
        InputError: If an argument is out of its range, or later an input has another shape.

    Example:
        >>> import torch
        >>> Encoder((1, 8, 8), outputs=10, width=8)(torch.ones(3, 1, 8, 8), torch.zeros(3)).shape
        torch.Size([3, 10])
    """

    conditioning: Conditioning

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        *,
        dropout: float = 0.0,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        self.shape = check_wholes("shape", shape)
        check_whole("outputs", outputs)
        check_whole("width", width, least=4)
        check_whole("blocks", blocks)
        style, activation, dims = Architecture(), nn.SiLU(), len(self.shape) - 1
        if dims not in (1, 2, 3):
            raise InputError(
                f"shape must be (C, L), (C, H, W) or (C, D, H, W), got {self.shape}; use "
                "MLP(outputs=...) for vectors."
            )
        parts = Parts(
            features=4 * width,
            layout=AttentionLayout(),
            dropout=dropout,
            norm=style.norm,
            activation=activation,
            resampling=style.resampling,
            rescale=style.rescale,
            init_scale=style.init_scale,
            dims=dims,
        )
        widths = [width * m for m in check_wholes("multipliers", multipliers)]
        embedding = embedding or FourierEmbedding(width + width % 2)
        self.conditioning = Conditioning(embedding, 4 * width, activation)
        self.stem = parts.point(self.shape[0], width)
        sources = [width, *widths[:-1]]
        steps = [style.transition] * (len(widths) - 1) + [None]
        self.down = nn.ModuleList(
            DownLevel(source, channels, blocks, parts, lambda n: nn.Identity(), step)
            for source, channels, step in zip(sources, widths, steps, strict=True)
        )
        self.middle = Middle(widths[-1], parts)
        self.norm, self.activation = parts.norm(widths[-1]), activation
        self.linear = initialise(nn.Linear(widths[-1], outputs), scale=0.0)

    def forward(self, x: Tensor, c: Tensor, **conditions: Tensor) -> Tensor:
        """Returns outputs ``(B, outputs)`` for states ``(B, C, *)`` and noise labels ``(B,)``."""
        if x.shape[1:] != self.shape:
            raise InputError(
                f"Examples must have shape {self.shape} for this network, got "
                f"{tuple(x.shape[1:])}."
            )
        features = self.conditioning(c, x, conditions)
        h = self.stem(padded(x, len(self.down)))
        for level in self.down:
            states, _ = level(h, h, features)
            h = states[-1]
        h = self.activation(self.norm(self.middle(h, features)))
        return self.linear(h.flatten(2).mean(2))
