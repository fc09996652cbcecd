"""The training loop, in plain torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from scoresde.data import Augmentation, Batch, Dataset
from scoresde.errors import InputError
from scoresde.loss import Loss
from scoresde.model import Trainable
from scoresde.streams import Purpose, Streams
from scoresde.train.checkpoint import NAME
from scoresde.train.dropout import check_dropout
from scoresde.train.engine import Engine, ProcessGroup
from scoresde.train.journal import Bad, Journal
from scoresde.train.levels import check_levels
from scoresde.train.saving import CheckpointManager
from scoresde.train.snapshots import save_snapshot
from scoresde.train.state import State
from scoresde.train.stopping import StopSignals, TrainingStopped
from scoresde.train.tracker import Tracker
from scoresde.train.training import Training
from scoresde.train.update import Update

BAD_BATCH = "bad_batch.pt"  # the batch of the update that stopped the training

Kind = TypeVar("Kind", bound=Trainable)
Inspection = Callable[[int, Kind], Mapping[str, float | Path]]


def orders(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yields the epoch and the indices of each batch, int64 ``(B,)``, without end.

    Arguments:
        count: The number of examples.
        batch_size: The number of examples in a batch, at most all of them.
        seed: Seed of the orders; each epoch has its own order.
        start: The number of batches to skip, at no cost.
    """
    size = min(batch_size, count)
    epoch, first = divmod(start, count // size)
    while True:
        keys = Streams.of(seed, batch=count).uniform((), Purpose.ORDER, epoch, torch.float64)
        order = keys.argsort(stable=True)
        for i in range(first, count // size):
            yield epoch, order[i * size : (i + 1) * size]
        epoch, first = epoch + 1, 0


def batches(
    data: Dataset,
    batch_size: int,
    seed: int,
    augment: Augmentation | None = None,
    start: int = 0,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """Yields training batches without end: each example once per epoch, in a new order.

    Examples at the end of an epoch that do not fill a batch are skipped in that epoch. The
    condition ``augment`` describes the augmentation of each example to the network. The first
    ``start`` batches are skipped at no cost. Only the examples in ``part`` of each batch are
    returned.
    """
    found = orders(len(data.train), batch_size, seed, start)
    mine = ((epoch, rows[part]) for epoch, rows in found)
    for epoch, streams, batch in data.batches("train", mine, seed):
        if augment is None:
            yield batch
        else:
            x, labels = augment(batch.x, streams, epoch)
            yield Batch(x, {**batch.cond, "augment": labels})


def train(
    model: Kind,
    data: Dataset,
    loss: Loss,
    training: Training,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
    folder: Path,
    *,
    recipe: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    engine: Engine | None = None,
    inspect: Inspection[Kind] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Kind:
    """Trains a model, and writes ``checkpoint.pt`` and ``metrics.jsonl`` to a folder.

    If the folder holds a checkpoint of the same training run, training resumes from it and ends
    with the weights of an uninterrupted run: batches, times and noise are functions of the seed
    and the step, and the checkpoint holds the rest. SIGINT and SIGTERM stop training after the
    current step, with a checkpoint, unless the process ignores them.

    Several processes started by torchrun (see :func:`scoresde.train.process_group`) share the
    batches. Their weights equal those of a single process up to rounding.

    Arguments:
        model: The model, on its device; it is changed.
        data: The data, on the same device; otherwise batches are moved to it one by one.
        loss: The loss.
        training: Training settings.
        optimizer: Callable that builds an optimiser from parameters.
        folder: The run's folder; it must exist.
        recipe: Description of the run to store in the checkpoint (see :class:`Checkpoint`).
        seed: Seed of the random streams of batches, times and noise.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).
        engine: Parallelism strategy for several processes; :class:`Replicated` by default.
        inspect: Callable that evaluates the averaged model every ``inspect_every`` updates and
            returns what to record: numbers, and paths of pictures.
        trackers: Trackers that record the numbers in addition to ``metrics.jsonl``.

    Returns:
        The model with averaged weights, for evaluation.

    Raises:
        InputError: If more losses or gradients than ``max_skipped`` are not finite; the message
            gives the step, the file with the batch, and the last good checkpoint. If the folder
            holds the checkpoint of another training run, or has no room for a checkpoint.
        TrainingStopped: If a signal was received.
    """
    group, size = ProcessGroup.here(), min(training.batch_size, len(data.train))
    _check_shares(size, training, group)
    if training.augment is not None and not model.takes("augment"):
        raise InputError(
            f"train.augment must be null for a network without the condition augment, got "
            f"{training.augment}; build the network with conditions={{augment: "
            f"{training.augment.width}}}."
        )
    check_dropout(model, data, training.condition_dropout)
    check_levels(loss, data)
    _check_images(model, data, training)
    update = Update(model, loss, training, optimizer, engine, seed)
    state = State(
        update.terms, update.averages, update.optimiser, update.scale, recipe or {}, seed, folder
    )
    keeper = CheckpointManager(folder, training.keep)
    average = cast(Kind, update.averages[0].model)
    start = _agreed(state.restore(keeper.newest(state.pattern())), group)
    keeper.check_room(state.size())
    journal = Journal(training, state, start, progress and group.first, trackers)
    source = batches(data, size, seed, training.augment, start, group.part(size))
    model.train()
    try:
        with StopSignals() as signals:
            for step, batch in enumerate(islice(source, training.steps - start), start):
                x, cond = model.state(batch.x.to(model.device)), loss.select(model, batch.cond)
                journal.add(update(x, cond, step, size), update.parts)
                done, last = step + 1, step + 1 == training.steps
                reading = last or done % training.log_every == 0
                # Processes receive a signal at different steps; they check for it together here.
                asked = reading or group.size == 1
                stopped = asked and not last and signals.any(group)
                saving = last or stopped or done % training.save_every == 0
                if saving or reading:
                    bad = journal.read(done, size, update.optimiser)
                    if bad is not None:
                        _stop(bad, state, data, training, group)
                if last or done % training.validate_every == 0:
                    held_out = journal.validate(done, average, data, loss)
                    if training.keep_best and held_out < state.best:
                        state.best = held_out
                        keeper.save_best(state.checkpoint(done))
                if inspect and training.inspect_every and done % training.inspect_every == 0:
                    _record(inspect(done, average), done, journal)
                if training.stores(done):
                    save_snapshot(state, done)
                if saving:
                    keeper.save(state.checkpoint(done), last)
                if stopped:
                    raise TrainingStopped(done, signals.number)
    finally:
        journal.close()
    return average


def _record(found: Mapping[str, float | Path], done: int, journal: Journal) -> None:
    journal.log(done, **{k: v for k, v in found.items() if not isinstance(v, Path)})
    for name, value in found.items():
        if isinstance(value, Path):
            journal.image(done, name, value)


def _check_images(model: Trainable, data: Dataset, training: Training) -> None:
    """Checks that an augmentation does not move examples relative to their image conditions."""
    known = data.conditions_of("train", slice(1)) if training.augment is not None else {}
    for name, values in known.items():
        if values.ndim > 2 and values.shape[2:] == data.shape[1:] and model.takes(name):
            raise InputError(
                f"train.augment must be null for data with the image condition {name}, which it "
                f"does not transform, got {training.augment}; use data.flip=true, which mirrors "
                "both."
            )


def _check_shares(size: int, training: Training, group: ProcessGroup) -> None:
    least = training.accumulate * group.size
    if size < least:
        few = size < training.batch_size
        name = "The number of training examples" if few else "train.batch_size"
        raise InputError(
            f"{name} must be at least {least}, the product of train.accumulate="
            f"{training.accumulate} and the number of processes, {group.size}, got {size}."
        )


def _agreed(start: int, group: ProcessGroup) -> int:
    if len(set(group.all(start))) > 1:
        raise InputError(
            "All processes must read the same checkpoint, got checkpoints of "
            f"{group.all(start)} updates; set hydra.run.dir to a folder that all machines share."
        )
    return start


def _stop(
    bad: Bad, state: State, data: Dataset, training: Training, group: ProcessGroup
) -> NoReturn:
    """Saves the batch of a step and ends the training."""
    folder = state.folder
    if group.first:
        source = batches(data, training.batch_size, state.seed, training.augment, bad.step)
        batch = next(source).to("cpu")
        content = {"step": bad.step + 1, "x": batch.x, "cond": batch.cond}
        torch.save(content, folder / BAD_BATCH)
    saved = "no checkpoint has been written"
    if (folder / NAME).exists():
        saved = f"the last good checkpoint is {folder / NAME}"
    raise InputError(
        f"Training stopped at step {bad.step + 1}: the loss is {bad.loss:.4g} and the gradient "
        f"norm {bad.norm:.4g}. At most train.max_skipped={training.max_skipped} updates may fail, "
        f"and the last must succeed. The batch is {folder / BAD_BATCH}; {saved}. Lower the "
        "learning rate (optimizer.lr), clip the gradient (train.clip), or check the data."
    )
