r"""The codec of a latent model, from raw data to model units, latents and scaled latents.

.. math:: y \to x \to z \to \frac{z - m}{w}

The first step is the codec that the autoencoder was trained with, the second the autoencoder, and
the third the latents' shift :math:`m` and width :math:`w`, measured over training examples. The
width is part of the codec, so a different width changes the model's units but no likelihood:

.. math:: \log p(y) \ge \mathbb{E}_{q(z \mid x)} \left[ \log p\left(\tfrac{z - m}{w}\right)
          - \sum_i \log w_i + \log p(x \mid z) - \log q(z \mid x) \right] + \log \left|
          \frac{dx}{dy} \right| .

References:
    Vahdat et al., *Score-based generative modeling in latent space*, 2021,
    https://arxiv.org/abs/2106.05931.
    Rombach et al. 2022, https://arxiv.org/abs/2112.10752 (the scale of the latents, there a
    constant for one data set).
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from scoresde.codec.affine import Affine, Numbers, fitted
from scoresde.codec.autoencoder import NeuralCodec, draw_latents
from scoresde.codec.base import Codec
from scoresde.codec.encoder import DiagonalGaussian
from scoresde.errors import InputError
from scoresde.recipe import brief, describe
from scoresde.streams import Streams

_ROWS = 512  # examples that are encoded or decoded at once


@final
@dataclass(frozen=True, eq=False, repr=False)
class LatentCodec(Codec):
    """An autoencoder as the codec of a data set, with the scale of its latents.

    The autoencoder is copied, frozen and in evaluation mode. Integers are encoded from the centres
    of their levels.

    Arguments:
        units: The codec between raw data and the input of the autoencoder.
        autoencoder: The autoencoder.
        shift: The latent value that becomes 0: one number, or a tensor that broadcasts to the
            latents.
        width: The latent length that becomes 1, positive: one number, or a tensor that broadcasts
            to the latents.
        weights: The autoencoder's weights, to be loaded into it; None to keep its own.

    Raises:
        InputError: If the shapes or levels of the parts differ, a width is not positive, or
            integers are combined with a likelihood of real data.
    """

    units: Codec
    autoencoder: NeuralCodec
    shift: Numbers = 0.0
    width: Numbers = 1.0
    weights: InitVar[Mapping[str, Tensor] | None] = None
    shape: Sequence[int] = field(init=False)
    levels: int | None = field(init=False)
    low: Any = field(init=False)
    high: Any = field(init=False)

    def __post_init__(self, weights: Mapping[str, Tensor] | None) -> None:
        check_units(self.units, self.autoencoder)
        own = copy.deepcopy(self.autoencoder)
        if weights is not None:
            _load(own, weights)
        values = {
            "autoencoder": own.eval().requires_grad_(False),
            "shape": tuple(own.shape),
            **{name: getattr(self.units, name) for name in ("levels", "low", "high")},
            **{k: fitted(k, getattr(self, k), tuple(own.shape)) for k in ("shift", "width")},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not bool((torch.as_tensor(self.width) > 0).all()):
            raise InputError(f"width must be positive, got {brief(self.width)}.")

    @staticmethod
    def plain(autoencoder: NeuralCodec) -> "LatentCodec":
        """Returns the codec of an autoencoder for floats in its own units."""
        return LatentCodec(Affine(tuple(autoencoder.raw_shape)), autoencoder)

    @staticmethod
    def measured(units: Codec, autoencoder: NeuralCodec, raw: Tensor) -> "LatentCodec":
        """Returns the codec whose latents have mean 0 and unit variance in each channel.

        Latents without spatial axes have a scale for each latent.

        Arguments:
            units: As in the class, like ``autoencoder``.
            raw: Raw training examples to measure, ``(N, *)``; each is encoded with one draw.
        """
        codec = LatentCodec(units, autoencoder)
        z = codec.encode(raw, Streams.of(0, batch=len(raw), device=raw.device)).double()
        axes = [0, *range(2, z.ndim)]
        mean, std = z.mean(axes, keepdim=True)[0], z.std(axes, unbiased=False, keepdim=True)[0]
        if not bool(std.isfinite().all()):
            raise InputError(
                "The latents of the autoencoder must be finite, got NaN or infinity; train it "
                "again."
            )
        std = std.where(std > 0, 1.0)
        return LatentCodec(units, autoencoder, mean.tolist(), std.tolist())

    @property
    def raw_shape(self) -> Sequence[int]:
        """The shape of one raw example."""
        return self.units.raw_shape

    @property
    def stochastic(self) -> bool:
        """True if the encoder draws the latents."""
        return self.autoencoder.stochastic

    def placed(self, device: torch.device | str) -> "LatentCodec":
        self.autoencoder.to(device)
        return self

    def encode(self, raw: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        def one(part: Tensor, rows: slice) -> Tensor:
            own = None if streams is None else streams[rows]
            z = self.autoencoder.encode(self.units.encode(part), own, draw)
            m, w = self._scale(z)
            return ((z - m) / w).to(raw.device)

        return _by_parts(one, raw)

    def moments(self, raw: Tensor) -> Tensor | None:
        """Returns the moments of the latents of raw examples, on their device, to be cached."""
        if self.autoencoder.moments(self.units.encode(raw[:1])) is None:
            return None

        def one(part: Tensor, rows: slice) -> Tensor:
            found = self.autoencoder.moments(self.units.encode(part))
            assert found is not None
            return found.to(raw.device)

        return _by_parts(one, raw)

    def draw(self, moments: Tensor, streams: Streams | None = None, draw: int = 0) -> Tensor:
        """Returns the result of :meth:`encode` from cached moments, ``(B, 2, *)``."""
        z = moments[:, 0]
        if moments.shape[1] == 2:
            z = draw_latents(DiagonalGaussian(z, moments[:, 1]), streams, draw)
        m, w = self._scale(z)
        return (z - m) / w

    def decode(self, x: Tensor, rounded: bool = True) -> Tensor:
        def one(part: Tensor, rows: slice) -> Tensor:
            mean = self.autoencoder.decode(self._latents(part))
            return self.units.decode(mean.to(x.device), rounded)

        return _by_parts(one, x)

    def log_det(self, raw: Tensor, x: Tensor) -> Tensor | None:
        if self.autoencoder.log_det(self.units.encode(raw[:1]), self._latents(x[:1])) is None:
            return None
        volume = torch.as_tensor(self.width, dtype=torch.float64).log().expand(tuple(self.shape))

        def one(part: Tensor, rows: slice) -> Tensor:
            seen = self.units.encode(part)
            found = self.autoencoder.log_det(seen, self._latents(x[rows]))
            assert found is not None
            inner = None if self.autoencoder.data_levels else self.units.log_det(part, seen)
            total = found.double().cpu() - float(volume.sum())
            return (total if inner is None else total + inner.cpu()).to(x.device)

        return _by_parts(one, raw)

    def to_unit(self, x: Tensor) -> Tensor:
        return self.units.to_unit(self.autoencoder.decode(self._latents(x)).to(x.device))

    def describe(self) -> dict[str, Any]:
        """Returns the recipe of the codec: plain values, and the weights as tensors."""
        state = self.autoencoder.state_dict()
        return {
            "_target_": "scoresde.codec.LatentCodec",
            "units": self.units.describe(),
            "autoencoder": describe(self.autoencoder),
            "shift": describe(self.shift),
            "width": describe(self.width),
            "weights": {name: value.detach().cpu().clone() for name, value in state.items()},
        }

    def __repr__(self) -> str:
        name = type(self.autoencoder).__name__
        numbers = f"shift={self.shift}, width={self.width}"
        return f"LatentCodec({self.units}, {name} {self._digest}, {numbers})"

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for name, value in sorted(self.autoencoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().double().contiguous().numpy().data)
        return digest.hexdigest()

    def _latents(self, x: Tensor) -> Tensor:
        """Returns the autoencoder's own latents."""
        if x.shape[1:] != tuple(self.shape):
            raise InputError(
                f"Latents must have shape {tuple(self.shape)}, got {tuple(x.shape[1:])}."
            )
        z = self.autoencoder.state(x)
        m, w = self._scale(z)
        return z * w + m

    def _scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.shift).to(z), torch.as_tensor(self.width).to(z)


def _by_parts(act: Callable[[Tensor, slice], Tensor], values: Tensor) -> Tensor:
    """Applies a function to a few rows at a time, because its networks may need much memory."""
    if len(values) <= _ROWS:
        return act(values, slice(None))
    starts = range(0, len(values), _ROWS)
    return torch.cat([act(values[i : i + _ROWS], slice(i, i + _ROWS)) for i in starts])


def check_units(units: Codec, autoencoder: NeuralCodec) -> None:
    """Checks that the shape and the levels of data are those of an autoencoder."""
    if not isinstance(autoencoder, NeuralCodec) or not isinstance(units, Codec):
        raise InputError(
            "units must be a Codec, and autoencoder a NeuralCodec such as a VAE, got "
            f"{type(units).__name__} and {type(autoencoder).__name__}."
        )
    if tuple(units.shape) != tuple(autoencoder.raw_shape):
        raise InputError(
            f"autoencoder must take examples of shape {tuple(units.shape)}, got "
            f"{tuple(autoencoder.raw_shape)}; train an autoencoder on these data."
        )
    dense = autoencoder.has_density and autoencoder.data_levels != units.levels
    if dense:
        raise InputError(
            f"likelihood must have levels={units.levels}, as the data, got "
            f"levels={autoencoder.data_levels}; use LevelEmission(levels) for integers, or "
            "GaussianEmission() for real-valued data."
        )


def _load(autoencoder: NeuralCodec, weights: Mapping[str, Tensor]) -> None:
    try:
        autoencoder.load_state_dict(dict(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"weights must match the autoencoder, got others ({brief(error)}); the file is "
            "damaged, or a class in it has changed."
        ) from error
