r"""Embeddings of the noise label as features of different frequencies.

A network that receives a single number :math:`c` learns only slowly varying functions of it. An
embedding provides

.. math:: (\sin \omega_1 c, \ldots, \sin \omega_n c, \cos \omega_1 c, \ldots, \cos \omega_n c),

and the frequencies determine how finely the network can distinguish noise levels. They must match
the unit of the label: a typical feature should oscillate several times over the range of the
label.

=======================================  ===============  ========================================
label                                    range            embedding
=======================================  ===============  ========================================
:math:`\tfrac14 \log (\sigma / \alpha)`  about -2 to 1.5  ``FourierEmbedding(width)``
:math:`\sigma` (NCSN++)                  0.01 to 50       ``FourierEmbedding(width, 16, log=True)``
:math:`999 t` (DDPM)                     0 to 999         ``PositionalEmbedding(width)``
=======================================  ===============  ========================================

References:
    Vaswani et al., *Attention is all you need*, 2017, https://arxiv.org/abs/1706.03762 (section
    3.5).
    Tancik et al., *Fourier features let networks learn high frequency functions in low
    dimensional domains*, 2020, https://arxiv.org/abs/2006.10739.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.nn.basics import check_whole, initialise
from scoresde.nn.conditions import Conditions, VectorCondition, check_vectors
from scoresde.recipe import describable

_SEED = 0


class Embedding(nn.Module, ABC):
    """Base class for embeddings of noise labels ``(B,)`` as features ``(B, width)``.

    Arguments:
        width: The number of features, even: half of them are sines, half cosines.
        least: The smallest width that the embedding is defined for.
    """

    def __init__(self, width: int, least: int = 2) -> None:
        super().__init__()
        self.width = check_whole("width", width, least)
        if width % 2:
            raise InputError(
                f"width must be even for an embedding of sines and cosines, got {width}; use "
                f"{width + 1}."
            )

    @abstractmethod
    def forward(self, c: Tensor) -> Tensor:
        """Returns the features of each label, ``(B,)`` to ``(B, width)``."""


@describable
class PositionalEmbedding(Embedding):
    r"""Sines and cosines of geometrically spaced frequencies.

    .. math:: \omega_k = s P^{-k / (n - 1)}, \qquad k = 0, \ldots, n - 1

    The defaults suit labels that count steps, such as :math:`999 t`. Labels of order 1 need a
    larger ``scale``, 10 to 1000.

    References:
        Ho et al., *Denoising diffusion probabilistic models*, 2020,
        https://arxiv.org/abs/2006.11239 (appendix B; the divisor n - 1 is in their code).

    Arguments:
        width: The number :math:`2n` of features, even, at least 4.
        scale: The highest frequency :math:`s` in radians per unit of the label, positive.
        max_period: The ratio :math:`P` of the highest to the lowest frequency, above 1.

    Example:
        >>> PositionalEmbedding(4, max_period=100)(torch.zeros(1))
        tensor([[0., 0., 1., 1.]])
    """

    def __init__(self, width: int, scale: float = 1.0, max_period: float = 10000.0) -> None:
        super().__init__(width, least=4)
        self.scale = _check_scale(scale)
        if not 1 < max_period < math.inf:
            raise InputError(
                f"max_period must be above 1 and finite, got {max_period!r}; DDPM uses 10000."
            )
        self.max_period = max_period

    def forward(self, c: Tensor) -> Tensor:
        half = self.width // 2
        k = torch.arange(half, device=c.device, dtype=c.dtype)
        frequencies = self.scale * torch.exp(-math.log(self.max_period) / (half - 1) * k)
        return _sines(c.unsqueeze(1) * frequencies)


@describable
class FourierEmbedding(Embedding):
    r"""Sines and cosines of random frequencies, which are not trained.

    .. math:: \omega_k = 2 \pi W_k, \qquad W_k \sim N(0, s^2)

    With ``log``, the logarithm of the label is embedded, so the label must be positive. The
    frequencies depend only on the width and the scale: they are drawn from a separate generator,
    so the global generator is unchanged. They are stored as a buffer and saved with the weights.

    References:
        Tancik et al. 2020 (the Gaussian mapping).
        Song et al., https://arxiv.org/abs/2011.13456 (NCSN++, with a scale of 16).

    Arguments:
        width: The number :math:`2n` of features, even, at least 2.
        scale: The standard deviation :math:`s` of the frequencies in turns per unit of the label,
            or of its logarithm, positive.
        log: Whether to embed the logarithm of the label, as for a label that is sigma itself.

    Example:
        >>> FourierEmbedding(4)(torch.zeros(3)).shape
        torch.Size([3, 4])
    """

    W: Tensor

    def __init__(self, width: int, scale: float = 1.0, log: bool = False) -> None:
        super().__init__(width)
        self.scale = _check_scale(scale)
        self.log = log
        generator = torch.Generator().manual_seed(_SEED)
        # Always drawn on the CPU in float64, then moved to the default device and data type.
        normal = torch.randn(width // 2, generator=generator, device="cpu", dtype=torch.float64)
        self.register_buffer("W", (scale * normal).to(torch.empty(0)))

    def forward(self, c: Tensor) -> Tensor:
        turns = (torch.log(c) if self.log else c).unsqueeze(1) * self.W
        return _sines(2 * math.pi * turns)


class Conditioning(Conditions):
    """Features of the noise label and the conditions: an embedding followed by two layers.

    Further conditions are vectors. Each is multiplied by a matrix that starts at zero and added to
    the features. A row of NaN, or a missing condition, is "none", which has a learned vector that
    also starts at zero. Only ``augment`` has no such vector: its zeros mean that no augmentation
    was applied. A class, the condition ``label``, has a row of a table that starts at zero. The
    last row is for no class, that is, a label of -1 or no label.

    Arguments:
        embedding: The embedding of one label.
        features: The number of features passed to the blocks of the network.
        activation: The activation after each of the two layers. If None, SiLU is used.
        conditions: The name and the number of entries of each further condition.
        classes: The number of classes; 0 for a network that takes no label.
    """

    def __init__(
        self,
        embedding: Embedding,
        features: int,
        activation: nn.Module | None = None,
        conditions: Mapping[str, int] | None = None,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.activation = activation or nn.SiLU()
        self.hidden = initialise(nn.Linear(embedding.width, features))
        self.out = initialise(nn.Linear(features, features))
        widths = check_vectors(conditions)
        self.conditions = nn.ModuleDict(
            {name: initialise(_layer(name, n, features), scale=0.0) for name, n in widths.items()}
        )
        self.classes = None
        if check_whole("classes", classes, least=0):
            if "label" in widths:
                raise InputError(
                    f"conditions.label and classes={classes} cannot be combined: both define the "
                    "condition label."
                )
            # No random draw, so the other weights start the same as without classes.
            table = torch.zeros(classes + 1, features)
            self.classes = nn.Embedding.from_pretrained(table, freeze=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the accepted conditions."""
        return (*self.conditions, *(["label"] if self.classes is not None else []))

    def weights_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        if self.classes is not None and name == "label":
            return self.classes.weight[-1], self.classes.weight[:-1]
        layer = self.conditions[name]
        return (layer.none, layer.weight) if isinstance(layer, VectorCondition) else None

    def forward(self, c: Tensor, x: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Returns features ``(B, features)`` for labels ``(B,)``, in the data type of ``x``.

        Raises:
            InputError: If there is not one label per example of ``x``, or the name or shape of a
                condition differs from the declared one.
        """
        if c.shape != x.shape[:1]:
            raise InputError(
                f"c must have shape ({x.shape[0]},), one noise label per example, got "
                f"{tuple(c.shape)}."
            )
        # Embedded before the cast: a label of 999 t in bfloat16 is too coarse.
        h = self.activation(self.hidden(self.embedding(c).to(x.dtype)))
        h = self.out(h)
        for name, values in conditions.items():
            if name != "label" or self.classes is None:
                h = h + self._layer(name, values, x)(values.to(x.dtype))
        for name, layer in self.conditions.items():
            if name not in conditions and isinstance(layer, VectorCondition):
                h = h + layer(x.new_full((1, layer.in_features), torch.nan))
        if self.classes is not None:
            h = h + self._class(conditions.get("label"), x, self.classes)
        return self.activation(h)

    def _class(self, label: Tensor | None, x: Tensor, table: nn.Embedding) -> Tensor:
        """Returns the row of each example's class, ``(B, features)``."""
        none = table.num_embeddings - 1
        if label is None:
            return table.weight[none].to(x.dtype).expand(len(x), -1)
        if not isinstance(label, Tensor):
            raise InputError(
                f"label must be an integer tensor of shape ({len(x)},), got {label!r}; use "
                f"torch.full(({len(x)},), CLASS)."
            )
        whole = not label.is_floating_point() and label.dtype != torch.bool
        if label.shape != x.shape[:1] or not whole:
            raise InputError(
                f"label must be an integer tensor of shape ({len(x)},), got {label.dtype} of "
                f"shape {tuple(label.shape)}."
            )
        label = label.long()
        # On a GPU this check would synchronise at every evaluation and break the graph of a
        # compiled network; there, an invalid row is an error of the lookup.
        checked = label.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and not bool(((label >= -1) & (label < none)).all()):
            raise InputError(
                f"label must be -1 or a class from 0 to {none - 1}, got {label.unique().tolist()}."
            )
        row = torch.where(
            label < none, label, none + 1
        )  # an invalid class must stay an invalid row
        return table(torch.where(label == -1, none, row)).to(x.dtype)

    def _layer(self, name: str, values: Tensor, x: Tensor) -> nn.Module:
        """Returns the layer of a condition ``(B, n)``."""
        if name not in self.conditions:
            raise InputError(
                f"Conditions must be among those of the network "
                f"({', '.join(self.names) or 'none'}), got {name!r}; remove it, or build the "
                "network with "
                f"{'classes=C' if name == 'label' else f'conditions={{{name!r}: n}}'}."
            )
        layer = self.conditions[name]
        assert isinstance(layer, nn.Linear)
        if values.shape != (len(x), layer.in_features):
            raise InputError(
                f"{name} must have shape ({len(x)}, {layer.in_features}), one row per example, "
                f"got {tuple(values.shape)}."
            )
        return layer


class ConditionalNetwork(nn.Module):
    """Base class for networks that accept the conditions of their ``conditioning``, if any."""

    conditioning: Conditioning | None


def takes(network: Callable[..., Tensor], name: str) -> bool:
    """Returns whether a network accepts a condition.

    The signature of its ``forward`` lists the conditions after the data and the noise label, or
    accepts any by ``**cond``. With ``**cond``, a network that contains networks of this package
    accepts only the conditions of those networks.

    Example:
        >>> takes(lambda x, c, label=None: x, "label"), takes(lambda x, c: x, "label")
        (True, False)
    """
    parts = list(network.modules()) if isinstance(network, nn.Module) else []
    told = [part.names for part in parts if isinstance(part, Conditions)]
    ours = any(isinstance(part, Conditions | ConditionalNetwork) for part in parts)
    call = network.forward if isinstance(network, nn.Module) else network
    try:
        arguments = inspect.signature(call).parameters
    except (TypeError, ValueError):  # a built-in function has no signature
        return False
    anything = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments.values())
    inside = any(name in names for names in told) if ours else True
    return (anything and inside) or name in list(arguments)[2:]


def learned_none(network: Callable[..., Tensor], name: str) -> bool:
    """Returns whether a network has learned the "none" of a condition.

    The weights of "none" start at exactly zero and stay there unless they are trained, by
    ``train.condition_dropout`` or by data in which some conditions are "none". For a custom
    network, and for an untrained network, the answer cannot be determined, and True is returned.

    Arguments:
        network: The network, or a module around it.
        name: The name of the condition.

    Example:
        >>> from scoresde.nn import MLP
        >>> network = MLP(2, width=8, classes=2)
        >>> learned_none(network, "label")
        True
        >>> _ = nn.init.ones_(network.conditioning.classes.weight[:2])
        >>> learned_none(network, "label")
        False
    """
    parts = list(network.modules()) if isinstance(network, nn.Module) else []
    told = [part for part in parts if isinstance(part, Conditions) and name in part.names]
    weights = [pair for part in told if (pair := part.weights_of(name)) is not None]
    moved = [(bool((none != 0).any()), bool((others != 0).any())) for none, others in weights]
    return (False, True) not in moved


def _layer(name: str, width: int, features: int) -> nn.Linear:
    if name == "augment":
        return nn.Linear(width, features, bias=False)
    return VectorCondition(width, features)


def _check_scale(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise InputError(
            f"scale must be positive and finite, got {scale!r}; see scoresde.nn.embedding for "
            "the scale that suits each noise label."
        )
    return scale


def _sines(angles: Tensor) -> Tensor:
    """Returns the sines, then the cosines: ``(B, n)`` to ``(B, 2n)``."""
    return torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)
