"""The training loop, in plain torch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scoresde.data import Augmentation, Dataset
from scoresde.errors import InputError, check_count
from scoresde.loss import DenoisingScoreMatching
from scoresde.model import ScoreFunction, ScoreModel
from scoresde.streams import Purpose, Streams
from scoresde.train.checkpoint import NAME
from scoresde.train.ema import EMA
from scoresde.train.saving import Keeper
from scoresde.train.schedule import ConstantRate, Rate
from scoresde.train.state import State
from scoresde.train.stopping import StopSignals, TrainingStopped
from scoresde.train.tracker import Tracker

_VALIDATION_EXAMPLES = 1024
BAD_BATCH = "bad_batch.pt"  # what the last update was that could not be made


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Arguments:
        steps: The number of updates, positive.
        batch_size: The number of examples of an update, positive.
        rate: The schedule of the learning rate.
        ema: The decay of the weights' average, in [0, 1).
        clip: The largest norm of the gradient, positive; ``None`` clips nothing.
        max_skipped: How many updates may be left out because their loss or gradient is not
            finite, at least 0; one more ends the training.
        log_every: Every how many updates numbers are recorded.
        validate_every: Every how many updates the validation loss is measured.
        save_every: Every how many updates a checkpoint is written (and always after the last).
        keep: How many of the newest checkpoints are kept, positive.
        tensorboard: Whether to write TensorBoard events.
        bf16: Whether the network computes in bfloat16, by autocast; weights, their average and
            the optimiser's state stay in float32. ``None``: on a GPU.
        compile: Whether ``torch.compile`` makes the network's kernels, for a minute or so before
            the first step. ``None``: on a GPU.
        augment: How training images are augmented; the network is told by the condition
            ``augment``. ``None``: not at all.
    """

    steps: int = 10_000
    batch_size: int = 128
    rate: Rate = field(default_factory=ConstantRate)
    ema: float = 0.999
    clip: float | None = 1.0
    max_skipped: int = 10
    log_every: int = 50
    validate_every: int = 500
    save_every: int = 1000
    keep: int = 2
    tensorboard: bool = True
    bf16: bool | None = None
    compile: bool | None = None
    augment: Augmentation | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "save_every", "keep"):
            check_count(f"train.{name}", getattr(self, name))
        if not isinstance(self.max_skipped, int) or self.max_skipped < 0:
            raise InputError(f"train.max_skipped={self.max_skipped} is no number of updates.")
        if not isinstance(self.rate, Rate):
            raise InputError(f"train.rate={self.rate} is no Rate; give one, such as CosineRate().")
        if not isinstance(self.ema, int | float) or not 0 <= self.ema < 1:
            raise InputError(f"train.ema={self.ema} is no number in [0, 1); 0.999 is usual.")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"train.clip={self.clip} is not positive; give null for none.")
        for name in ("bf16", "compile"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"train.{name}={getattr(self, name)} is no true, false or null.")
        if not isinstance(self.augment, Augmentation | None):
            raise InputError(
                f"train.augment={self.augment} is no Augmentation; give one, such as "
                "GeometricAugmentation(), or null."
            )

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context in which the network computes."""
        return torch.autocast(device.type, torch.bfloat16, enabled=_on_gpu(self.bf16, device))

    def prepare(self, model: ScoreFunction) -> None:
        """Has the network's kernels made, if they are to be; its weights keep their names."""
        if isinstance(model, ScoreModel) and _on_gpu(self.compile, model.device):
            if not isinstance(model.network, nn.Module):
                raise InputError("train.compile=true needs a network that is a torch.nn.Module.")
            model.network.compile()


def _on_gpu(choice: bool | None, device: torch.device) -> bool:
    return device.type == "cuda" if choice is None else choice


def batches(
    data: Dataset,
    batch_size: int,
    seed: int,
    augment: Augmentation | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields training batches for ever: in every epoch each example once, in a new order.

    The last examples of an epoch that do not fill a batch wait for the next order. Beside the
    examples ``(B, *)`` come the conditions that tell the network how they were augmented. The
    first ``start`` batches are left out, at no cost.
    """
    n = len(data.train)
    size = min(batch_size, n)
    epoch, first = divmod(start, n // size)
    while True:
        keys = Streams.of(seed, batch=n).uniform((), Purpose.ORDER, epoch, torch.float64)
        order = keys.argsort(stable=True)
        for i in range(first, n // size):
            streams = Streams(seed, order[i * size : (i + 1) * size])
            x = data.batch("train", streams, epoch)
            if augment is None:
                yield x, {}
            else:
                x, labels = augment(x, streams, epoch)
                yield x, {"augment": labels}
        epoch, first = epoch + 1, 0


def train(
    model: ScoreFunction,
    data: Dataset,
    loss: DenoisingScoreMatching,
    training: Training,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ScoreFunction:
    """Trains a model, and leaves ``checkpoint.pt``, ``metrics.jsonl`` and events in a folder.

    If the folder holds a checkpoint of the same training, it goes on after that one, and ends with
    the weights of a training that was never interrupted: batches, times and noise are functions
    of the seed and the step, and the rest is in the checkpoint. SIGINT and SIGTERM end it after
    the step at hand, with a checkpoint.

    Arguments:
        model: The model, on its device; it is changed.
        data: The data; on the same device, or batch by batch brought to it.
        loss: The loss.
        training: How to train.
        optimizer: Makes an optimiser of parameters.
        folder: The run's folder; it must exist.
        recipe: What the checkpoint says of the run (see :class:`Checkpoint`).
        seed: Names the random streams of batches, times and noise.
        progress: Whether to show a progress bar.

    Returns:
        The model with averaged weights, for evaluation.

    Raises:
        InputError: If more losses or gradients than ``max_skipped`` are not finite; the message
            names the step, the batch, which is saved, and the last good checkpoint. If the folder
            holds the checkpoint of another training, or no room for one.
        TrainingStopped: If a signal asked for it.
    """
    ema = EMA(model, training.ema)
    training.prepare(model)
    optimiser = _optimiser(optimizer, model)
    base_rates = [group["lr"] for group in optimiser.param_groups]
    keeper = Keeper(folder, training.keep)
    state = State(model, ema, optimiser, recipe or {}, seed, folder)
    start = state.restore(keeper.newest())
    keeper.check_room(state.size())
    tracker = Tracker(folder, training.tensorboard, start)
    recent: list[Tensor] = []
    clock = time.perf_counter()
    model.train()

    bar = tqdm(
        total=training.steps, initial=start, desc="training", unit="step", disable=not progress
    )
    try:
        with StopSignals() as signals:
            source = batches(data, training.batch_size, seed, training.augment, start)
            for step, batch in enumerate(islice(source, training.steps - start), start):
                x, cond = _moved(batch, model.device)
                factor = training.rate(step, training.steps)
                for group, rate in zip(optimiser.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                seeds = range(step * len(x), (step + 1) * len(x))
                with training.autocast(x.device):
                    value = loss(model, x, seed=seed, seeds=seeds, **cond).mean()
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                limit = math.inf if training.clip is None else training.clip
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
                _update(optimiser, torch.isfinite(value.detach()) & torch.isfinite(norm))
                ema.update()
                recent.append(torch.stack((value.detach(), norm)))
                bar.update()

                done, last = step + 1, step + 1 == training.steps
                stopped = signals.received is not None and not last
                saving = last or stopped or done % training.save_every == 0
                if saving or done % training.log_every == 0:
                    mean, norm_mean, bad = _means(recent)
                    state.skipped += len(bad)
                    over = state.skipped - training.max_skipped
                    # One that ends so has diverged, however short it was.
                    diverged = last and len(recent) - 1 in bad
                    if over > 0 or diverged:
                        i = bad[-over] if over > 0 else bad[-1]
                        _stop(done - len(recent) + i, recent[i], state, data, training)
                    speed = len(recent) / (time.perf_counter() - clock)
                    tracker.log(
                        done,
                        loss=mean,
                        gradient_norm=norm_mean,
                        rate=factor * base_rates[0],
                        steps_per_second=speed,
                        **({"skipped": state.skipped} if state.skipped else {}),
                    )
                    bar.set_postfix(loss=f"{mean:.4f}")
                    recent, clock = [], time.perf_counter()
                if last or done % training.validate_every == 0:
                    with training.autocast(model.device):
                        size = training.batch_size
                        held_out = validation_loss(ema.model, data, loss, seed, size)
                    tracker.log(done, validation_loss=held_out)
                if saving:
                    keeper.save(state.checkpoint(done))
                if stopped:
                    assert signals.received is not None
                    raise TrainingStopped(done, signals.received)
    finally:
        bar.close()
        tracker.close()
    return ema.model


def _moved(
    batch: tuple[Tensor, dict[str, Tensor]], device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    x, cond = batch
    return x.to(device), {name: value.to(device) for name, value in cond.items()}


def _optimiser(
    make: Callable[[Iterable[Any]], torch.optim.Optimizer], model: ScoreFunction
) -> torch.optim.Optimizer:
    try:
        return make(model.parameters())
    except (ValueError, TypeError) as error:
        raise InputError(f"The optimiser refuses its settings, {make}: {error}.") from error


@torch.no_grad()
def validation_loss(
    model: ScoreFunction,
    data: Dataset,
    loss: DenoisingScoreMatching,
    seed: int,
    batch_size: int = _VALIDATION_EXAMPLES,
) -> float:
    """Returns the mean loss of validation examples (at most 1024), always with the same noise."""
    indices = torch.arange(min(len(data.validation), _VALIDATION_EXAMPLES))
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for part in indices.split(batch_size):
        x = data.batch("validation", Streams(seed, part)).to(model.device)
        total += loss(model, x, seed=seed, seeds=part.to(x.device)).double().sum()
    return float(total / len(indices))


def _update(optimiser: torch.optim.Optimizer, good: Tensor) -> None:
    """Takes a step, unless the gradient is not finite: that would spoil the weights for good.

    A fused optimiser is told on the device, which is then not waited for.
    """
    if getattr(optimiser, "_step_supports_amp_scaling", False):
        optimiser.found_inf = (~good).float()  # type: ignore[attr-defined]
        optimiser.step()
    elif bool(good):
        optimiser.step()


def _means(records: list[Tensor]) -> tuple[float, float, list[int]]:
    """Returns the means of the finite losses and norms, and the numbers of the other records."""
    values = torch.stack(records)
    good = torch.isfinite(values).all(1)
    loss, norm = values[good].mean(0).tolist()
    return loss, norm, (~good).nonzero()[:, 0].tolist()


def _stop(step: int, record: Tensor, state: State, data: Dataset, training: Training) -> NoReturn:
    """Saves the batch of a step, counted from 0, and ends the training."""
    folder = state.folder
    x, cond = next(batches(data, training.batch_size, state.seed, training.augment, step))
    torch.save({"step": step + 1, "x": x.cpu(), "cond": cond}, folder / BAD_BATCH)
    saved = "no checkpoint had been written yet"
    if (folder / NAME).exists():
        saved = f"the last good checkpoint is {folder / NAME}"
    loss, norm = record.tolist()
    raise InputError(
        f"Training stopped at step {step + 1}: the loss is {loss:.4g} and its gradient's norm "
        f"{norm:.4g}, and {training.max_skipped} updates may be left out; {saved}, the batch is "
        f"{folder / BAD_BATCH}. Lower the learning rate (optimizer.lr), clip the gradient "
        "(train.clip), or check the data."
    )
