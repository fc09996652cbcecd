"""Training settings, as plain values."""

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
    """Settings of a training run.

    Arguments:
        steps: The number of updates, positive.
        batch_size: The number of examples per update in all processes together, positive.
        accumulate: The number of passes into which a process divides its examples of an update,
            positive. More passes need less memory; the weights are the same up to rounding.
        rate: The learning-rate schedule.
        ema: The decay of the weights' average, in [0, 1).
        snapshots: The number of times that two averages are stored during training, at least 0. An
            average of any length can be computed from them afterwards (see
            :mod:`scoresde.train.snapshots`).
        lengths: The lengths of the two averages, as shares of the training.
        clip: The largest norm of the gradient, positive. If None, gradients are not clipped.
        max_skipped: The number of updates that may be skipped because their loss or gradient is
            not finite, at least 0. One more stops the training.
        log_every: The number of updates between records of the metrics.
        validate_every: The number of updates between measurements of the validation loss.
        inspect_every: The number of updates between periodic evaluations. If None, there are
            none.
        save_every: The number of updates between checkpoints; one is always written after the
            last update.
        keep: The number of newest checkpoints to keep, positive.
        keep_best: Whether to keep the checkpoint with the lowest validation loss as ``best.pt``.
        precision: The data type of the network's computation, by autocast: ``float32``, ``bf16``
            or ``fp16``. Weights, their averages and the optimiser's state stay in float32. If
            None, bf16 is used on a GPU and float32 elsewhere.
        compile: Whether to compile the network with ``torch.compile``, which takes about a minute
            before the first step; or a mode, such as ``reduce-overhead``. If None, the network is
            compiled on a GPU. If compilation is not available, a message is logged and the
            network is trained without it.
        augment: The augmentation of training images; the network receives its parameters as the
            condition ``augment``. If None, images are not augmented.
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
                raise InputError(f"train.{name} must be an integer >= 0, got {value}.")
        if not isinstance(self.rate, Rate):
            raise InputError(f"train.rate must be a Rate such as CosineRate(), got {self.rate}.")
        if not isinstance(self.ema, int | float) or not 0 <= self.ema < 1:
            raise InputError(
                f"train.ema must be a number in [0, 1), got {self.ema}; the default is 0.999."
            )
        rate = self.condition_dropout
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise InputError(
                f"train.condition_dropout must be a number in [0, 1), got {rate!r}; use 0.1."
            )
        profiles = {power_of_length(length) for length in self.lengths}
        if self.snapshots and len(profiles) < 2:
            raise InputError(
                f"train.lengths must contain two different lengths with train.snapshots="
                f"{self.snapshots}, got {self.lengths}; set train.lengths=[0.05,0.1]."
            )
        if self.clip is not None and not self.clip > 0:
            raise InputError(
                f"train.clip must be positive, got {self.clip}; set train.clip=null to disable "
                "clipping."
            )
        if self.precision is not None and self.precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise InputError(f"train.precision must be {names} or null, got {self.precision}.")
        if not isinstance(self.keep_best, bool):
            raise InputError(f"train.keep_best must be true or false, got {self.keep_best}.")
        if not isinstance(self.compile, bool | None) and self.compile not in MODES:
            modes = ", ".join(MODES)
            raise InputError(
                f"train.compile must be true, false, null or one of {modes}, got {self.compile}."
            )
        if not isinstance(self.augment, Augmentation | None):
            raise InputError(
                "train.augment must be an Augmentation such as GeometricAugmentation(), or null, "
                f"got {self.augment}."
            )

    def precision_on(self, device: torch.device) -> str:
        """Returns the name of the data type that the network computes in."""
        return self.precision or ("bf16" if device.type == "cuda" else "float32")

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context in which the network computes."""
        dtype = PRECISIONS[self.precision_on(device)]
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def prepare(self, model: Trainable) -> None:
        """Compiles the networks of a model, if requested; weights keep their names."""
        on = model.device.type == "cuda" if self.compile is None else self.compile
        found = networks(model)
        if self.compile and not found:
            raise InputError(
                "train.compile must be false or null for a model whose network is not a "
                f"torch.nn.Module, got {self.compile}."
            )
        for network in found if on and can_compile(model.device) else ():
            network.compile(mode="default" if on is True else on)

    def averages(self, model: Trainable) -> list[Average]:
        """Returns the averages of a model: the one in use, then those that are stored."""
        powers = [PowerEMA(model, length) for length in self.lengths] if self.snapshots else []
        return [EMA(model, self.ema), *powers]

    def stores(self, done: int) -> bool:
        """Returns whether the averages are stored after ``done`` updates."""
        times = min(self.snapshots, self.steps)
        return done * times // self.steps > (done - 1) * times // self.steps
