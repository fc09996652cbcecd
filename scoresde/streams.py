r"""Counter-based random streams, one per sample.

A generator with internal state gives sample :math:`i` different numbers whenever the batch, the
order or the number of devices changes. Here, a random number is a *function* of its address

.. math:: (\text{seed}, \text{index of the sample}, \text{purpose}, \text{draw}, \text{element})

computed by the block function Philox-4x32-10 in integer arithmetic. So sample :math:`i` of seed
:math:`s` gets the same numbers alone, in any batch, in any order, on any device, and after a
restart. Normal numbers are computed by the Box-Muller transform, in float64 on every device, and
are rounded once to the requested data type.

References:
    Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011 (section 3.3).
    Box and Muller, *A note on the generation of random normal deviates*, 1958.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import SupportsIndex

import torch
from torch import Tensor

from scoresde.errors import InputError

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SEEDS = 0xFF  # a purpose that no stream has
_SUBSET = 2**32 - 2  # a draw distinct from those of data


class Purpose(IntEnum):
    """Purpose of a random number; two purposes never share a number.

    The values are part of every seeded result: new purposes are appended, old ones never change.
    """

    LATENT = 0
    DIFFUSION = 1
    LANGEVIN = 2
    PROBE = 3
    TIME = 4
    NOISE = 5
    DEQUANTISE = 6
    ORDER = 7
    FLIP = 8
    DATA = 9
    COMPONENT = 10
    AUGMENT = 11
    CUTOFF = 12
    BROWNIAN = 13
    CONSTRAINT = 14
    FIRST_STEP = 15
    DROP = 16
    RESAMPLING = 17
    JUMP = 18
    SOURCE = 19
    MEASUREMENT = 20
    ENCODE = 21


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Applies the block function Philox-4x32-10.

    Arguments:
        counter: Four words of 32 bits in an int64 tensor, with shape ``(4, *)``.
        key: Two words of 32 bits.

    Returns:
        Four random words of 32 bits in an int64 tensor, with shape ``(4, *)``.
    """
    # Computed on the device by arithmetic: a copy from the host would synchronise.
    rounds = torch.arange(_ROUNDS, device=counter.device).unsqueeze(1)
    keys = _pair(key, counter.device) + rounds * _pair(_KEY_STEPS, counter.device)
    keys = (keys & _WORD).reshape(_ROUNDS, 2, *(1,) * (counter.ndim - 1))
    # In place: on a CPU, allocation would otherwise take most of the time.
    even, odd = counter[0::2].clone(), counter[1::2].clone()
    product = torch.empty_like(even)
    for round_key in keys.unbind():
        # The product wraps modulo 2^64, which keeps all of its bits; the mask drops the sign, and
        # the high half of ``odd``, whose low half is the word.
        for i, multiplier in enumerate(_MULTIPLIERS):
            torch.mul(even[i], multiplier, out=product[1 - i])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_WORD)
        odd, product = product, odd
    return torch.stack((even[0], odd[0], even[1], odd[1])).bitwise_and_(_WORD)


def _indices(seeds: Iterable[int], device: torch.device | str | None) -> Tensor:
    """Returns indices of streams on a device, int64; a range is created there without a copy."""
    if isinstance(seeds, range):
        _check_ends(*(seeds[0], seeds[-1]) if seeds else (0, 0))
        return torch.arange(seeds.start, seeds.stop, seeds.step, device=device)
    indices = torch.as_tensor(seeds if isinstance(seeds, Tensor) else list(seeds))
    if indices.is_floating_point() and len(indices):
        raise InputError(f"seeds must be integers in [0, 2^56), got type {indices.dtype}.")
    if indices.numel():
        _check_ends(int(indices.min()), int(indices.max()))
    return indices.to(device, torch.int64)


def _check_ends(first: int, last: int) -> None:
    for index in (first, last):
        if not 0 <= index < 2**56:
            raise InputError(f"seeds must be integers in [0, 2^56), got {index}.")


def _column(draw: int | Tensor, index: Tensor) -> Tensor:
    """Returns the draw index for every entry of ``index``, ``(B, blocks)``."""
    if isinstance(draw, Tensor):
        return draw[:, None].expand_as(index)
    return torch.full_like(index, draw)


def _pair(values: tuple[int, int], device: torch.device) -> Tensor:
    first, second = values
    return torch.arange(2, device=device) * (second - first) + first


def fresh_seed() -> int:
    """Draws a new seed from torch's global generator, so ``torch.manual_seed`` controls it."""
    return int(torch.randint(2**63 - 1, ()))


@dataclass(frozen=True)
class Streams:
    """The random streams of a batch of samples.

    Every method takes the ``shape`` of one sample, the ``purpose`` and the index of the ``draw``,
    such as a step (or one index per sample, int64 ``(B,)``). It returns one array per sample, with
    shape ``(B, *shape)``.

    Arguments:
        seed: Seed of the streams, in :math:`[0, 2^{64})`.
        indices: Indices of the streams, each in :math:`[0, 2^{56})`, with shape ``(B,)``, int64.

    Example:
        >>> both = Streams.of(seed=0, batch=2)
        >>> second = Streams.of(seed=0, seeds=[1])
        >>> a, b = both.normal((3,), Purpose.NOISE), second.normal((3,), Purpose.NOISE)
        >>> torch.equal(a[1], b[0])
        True
    """

    seed: int
    indices: Tensor

    @staticmethod
    def of(
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> "Streams":
        """Builds streams from user arguments.

        Arguments:
            seed: Seed of the streams. If None, a new one is drawn.
            seeds: Indices of the streams. If None, ``range(batch)`` is used.
            batch: The number of samples, if known.
            device: Device on which the numbers are computed.

        Raises:
            InputError: If a seed is out of range, or ``seeds`` does not match the batch size.
        """
        if seed is None:
            seed = fresh_seed()
        if not (isinstance(seed, SupportsIndex) and 0 <= int(seed) < 2**64):
            raise InputError(f"seed must be an integer in [0, 2^64), got {seed}.")
        seed = int(seed)
        if seeds is None:
            if batch is None:
                raise InputError("seeds or batch must be set, got None for both; pass one.")
            return Streams(seed, torch.arange(batch, device=device))
        indices = _indices(seeds, device)
        if indices.ndim != 1 or (batch is not None and len(indices) != batch):
            raise InputError(
                f"seeds must have shape ({'B' if batch is None else batch},), one index per "
                f"sample, got {tuple(indices.shape)}."
            )
        return Streams(seed, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice | Tensor) -> "Streams":
        return Streams(self.seed, self.indices[part])

    def _words(self, shape: Sequence[int], purpose: Purpose, draw: int | Tensor) -> Tensor:
        """Returns random words of 32 bits, with shape ``(4, B, blocks)``."""
        if not isinstance(draw, Tensor) and not 0 <= draw <= _WORD:
            raise InputError(f"draw must be in [0, 2^32), got {draw}; use another seed.")
        blocks = -(-math.prod(shape) // 4)
        index = self.indices[:, None].expand(-1, blocks)
        block = torch.arange(blocks, device=index.device).expand_as(index)
        counter = torch.stack(
            (
                block,
                _column(draw, index),
                index & _WORD,
                (index >> 32 << 8) | int(purpose),
            )
        )
        return philox(counter, (self.seed & _WORD, self.seed >> 32))

    def _fill(self, numbers: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Reshapes ``(4, B, blocks)`` numbers to ``(B, *shape)``."""
        rows = numbers.to(dtype).permute(1, 2, 0).flatten(1)[:, : math.prod(shape)]
        return rows.reshape(len(self), *shape)

    def uniform(
        self,
        shape: Sequence[int],
        purpose: Purpose,
        draw: int | Tensor = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draws numbers uniform in the open interval (0, 1), on a grid of spacing 2^-23.

        All of them are exact in float32, so rounding never returns 0 or 1.
        """
        words = self._words(shape, purpose, draw) >> 9
        return self._fill((words.double() + 0.5) * 2.0**-23, shape, dtype)

    def normal(
        self,
        shape: Sequence[int],
        purpose: Purpose,
        draw: int | Tensor = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        r"""Draws standard normal numbers.

        .. math:: \sqrt{-2 \log u_1} \, (\cos 2 \pi u_2, \sin 2 \pi u_2)
        """
        words = self._words(shape, purpose, draw)
        u = words.double().add_(0.5).mul_(2.0**-32)
        radius = u[:2].log_().mul_(-2).sqrt_()
        angle = u[2:].mul_(2 * torch.pi)
        return self._fill(
            torch.cat((radius * torch.cos(angle), radius * torch.sin(angle))), shape, dtype
        )

    def sign(
        self,
        shape: Sequence[int],
        purpose: Purpose,
        draw: int | Tensor = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draws -1 or 1 with equal probability (the Rademacher distribution)."""
        words = self._words(shape, purpose, draw) >> 31
        return self._fill(1 - 2 * words, shape, dtype)


def probe_seed(seed: int, draw: int) -> int:
    """Returns the seed of the probes of a draw; for the first draw, the seed itself.

    The other seeds are random words at the address (seed, draw).

    Arguments:
        seed: The seed, in :math:`[0, 2^{64})`.
        draw: The index of the draw, in :math:`[0, 2^{32})`.

    Returns:
        A seed, in :math:`[0, 2^{64})`.
    """
    if draw == 0:
        return seed
    counter = torch.tensor([[0], [draw], [0], [_SEEDS]])
    low, high = philox(counter, (seed & _WORD, seed >> 32)).flatten().tolist()[:2]
    return high << 32 | low


def random_rows(count: int, most: int | None = None) -> Tensor:
    """Returns the indices of a random subset of ``count`` examples, at most ``most``.

    The subset is always the same, so models are compared on the same examples, and a smaller
    subset is a prefix of a larger one. File order is avoided because neighbours are often alike.

    Arguments:
        count: The number of examples.
        most: The size of the subset, positive. If None, all examples are taken.

    Returns:
        The indices, int64, in random order; in ascending order if all are taken.

    Example:
        >>> random_rows(4), random_rows(100, 2) == random_rows(100, 4)[:2]
        (tensor([0, 1, 2, 3]), tensor([True, True]))
    """
    if most is None or most >= count:
        return torch.arange(count)
    keys = Streams.of(0, batch=count).uniform((), Purpose.DATA, _SUBSET, torch.float64)
    return keys.argsort(stable=True)[:most]
