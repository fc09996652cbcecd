"""How a model is trained, as plain values."""

from dataclasses import dataclass, field

import torch

from scoresde.data import Augmentation
from scoresde.errors import InputError, check_count
from scoresde.model import Trainable
from scoresde.nn.speed import MODES, PRECISIONS, can_compile
from scoresde.train.ema import EMA, Average, PowerEMA, power_of_length
from scoresde.train.engine import networks
from scoresde.train.schedule import ConstantRate, Rate


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Arguments:
        steps: The number of updates, positive.
        batch_size: The number of examples of an update, positive, in all processes together.
        accumulate: In how many passes a process takes its examples of an update, positive: more
            need less memory, and the weights are the same but for rounding.
        rate: The schedule of the learning rate.
        ema: The decay of the weights' average, in [0, 1).
        snapshots: How many times two averages are stored from which one of any length can be made
            after the training, at least 0 (see :mod:`scoresde.train.snapshots`).
        lengths: The lengths of these two, as shares of the training.
        clip: The largest norm of the gradient, positive; ``None`` clips nothing.
        max_skipped: How many updates may be left out because their loss or gradient is not
            finite, at least 0; one more ends the training.
        log_every: Every how many updates numbers are recorded.
        validate_every: Every how many updates the validation loss is measured.
        inspect_every: Every how many updates the model is looked at more closely; ``None``: never.
        save_every: Every how many updates a checkpoint is written (and always after the last).
        keep: How many of the newest checkpoints are kept, positive.
        keep_best: Whether the one with the least validation loss is kept too, as ``best.pt``.
        precision: What the network computes in, by autocast: ``float32``, ``bf16`` or ``fp16``;
            weights, their averages and the optimiser's state stay in float32. ``None``: bf16 on a
            GPU, else float32.
        compile: Whether ``torch.compile`` makes the network's kernels, for a minute or so before
            the first step, or a mode of it, such as ``reduce-overhead``. ``None``: on a GPU. Where
            it cannot, the log says so and the network is trained as it is.
        augment: How training images are augmented; the network is told by the condition
            ``augment``. ``None``: not at all.
        condition_dropout: The probability with which each condition of a training example is
            replaced by "none", in [0, 1): see :mod:`scoresde.train.dropout`.
    """

    steps: int = 10_000
    batch_size: int = 128
    accumulate: int = 1
    rate: Rate = field(default_factory=ConstantRate)
    ema: float = 0.999
    snapshots: int = 0
    lengths: tuple[float, ...] = (0.05, 0.10)
    clip: float | None = 1.0
    max_skipped: int = 10
    log_every: int = 50
    validate_every: int = 500
    inspect_every: int | None = None
    save_every: int = 1000
    keep: int = 2
    keep_best: bool = True
    precision: str | None = None
    compile: bool | str | None = None
    augment: Augmentation | None = None
    condition_dropout: float = 0.0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "validate_every")
        for name in (*counts, "save_every", "keep"):
            check_count(f"train.{name}", getattr(self, name))
        if self.inspect_every is not None:
            check_count("train.inspect_every", self.inspect_every)
        for name in ("max_skipped", "snapshots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"train.{name}={value} is no number of updates.")
        if not isinstance(self.rate, Rate):
            raise InputError(f"train.rate={self.rate} is no Rate; give one, such as CosineRate().")
        if not isinstance(self.ema, int | float) or not 0 <= self.ema < 1:
            raise InputError(f"train.ema={self.ema} is no number in [0, 1); 0.999 is usual.")
        rate = self.condition_dropout
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise InputError(
                f"train.condition_dropout must be a number in [0, 1), got {rate!r}; 0.1 is usual."
            )
        profiles = {power_of_length(length) for length in self.lengths}
        if self.snapshots and len(profiles) < 2:
            raise InputError(f"train.lengths={self.lengths} are too few; give two that differ.")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"train.clip={self.clip} is not positive; give null for none.")
        if self.precision is not None and self.precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise InputError(f"train.precision={self.precision} is none of {names}, or null.")
        if not isinstance(self.keep_best, bool):
            raise InputError(f"train.keep_best={self.keep_best} is neither true nor false.")
        if not isinstance(self.compile, bool | None) and self.compile not in MODES:
            modes = ", ".join(MODES)
            raise InputError(f"train.compile={self.compile} is no true, false, null or {modes}.")
        if not isinstance(self.augment, Augmentation | None):
            raise InputError(
                f"train.augment={self.augment} is no Augmentation; give one, such as "
                "GeometricAugmentation(), or null."
            )

    def precision_on(self, device: torch.device) -> str:
        """Returns the name of the data type that the network computes in."""
        return self.precision or ("bf16" if device.type == "cuda" else "float32")

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context in which the network computes."""
        dtype = PRECISIONS[self.precision_on(device)]
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def prepare(self, model: Trainable) -> None:
        """Has the kernels of its networks made, if they are to be; weights keep their names."""
        on = model.device.type == "cuda" if self.compile is None else self.compile
        found = networks(model)
        if self.compile and not found:
            raise InputError("train.compile=true needs a network that is a torch.nn.Module.")
        for network in found if on and can_compile(model.device) else ():
            network.compile(mode="default" if on is True else on)

    def averages(self, model: Trainable) -> list[Average]:
        """Returns the averages of a model: the one that counts, and those that are stored."""
        powers = [PowerEMA(model, length) for length in self.lengths] if self.snapshots else []
        return [EMA(model, self.ema), *powers]

    def stores(self, done: int) -> bool:
        """Whether the averages are stored after so many updates."""
        times = min(self.snapshots, self.steps)
        return done * times // self.steps > (done - 1) * times // self.steps
