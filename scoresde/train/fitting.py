"""Training in one call, in memory."""

import copy
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from scoresde.codec import NeuralCodec
from scoresde.codec.latent import check_units
from scoresde.data import Dataset, check_conditions, check_scales, split_indices
from scoresde.errors import InputError
from scoresde.loss import DenoisingScoreMatching, Loss
from scoresde.model import ScoreFunction, Trainable, check_model
from scoresde.progress import Progress
from scoresde.recipe import describe
from scoresde.shapes import check_data
from scoresde.train.checkpoint import NAME, Checkpoint
from scoresde.train.dropout import check_dropout
from scoresde.train.levels import check_levels
from scoresde.train.loop import batches
from scoresde.train.training import Training
from scoresde.train.update import Update
from scoresde.train.validation import validation_loss

Kind = TypeVar("Kind", bound=Trainable)
Data = Dataset | Tensor | tuple[Tensor, Mapping[str, Tensor]]

_CHECKS = 20  # measurements of the held-out loss, at least one every 500 updates


def fit(
    model: Kind,
    data: Data,
    steps: int = 2000,
    *,
    batch_size: int = 256,
    loss: Loss | None = None,
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    held_out: float = 0.1,
    ema: float = 0.999,
    condition_dropout: float = 0.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Kind:
    """Trains a model, and returns it with the averaged weights of the lowest held-out loss.

    No files are written unless a folder is given. Batches, times and noise are functions of the
    seed and the step; a data set yields the same batches as in :func:`scoresde.train.train`.

    Arguments:
        model: The model; it is trained in place, and a copy is returned.
        data: A data set, or examples in model units, floats with shape ``(N, *)``, or a pair of
            examples and conditions, each with shape ``(N, *)``, such as
            ``(x, {"label": labels})``.
        steps: The number of updates, positive.
        batch_size: The number of examples per update, positive.
        loss: The loss; ``DenoisingScoreMatching()`` by default.
        optimizer: Callable that builds an optimiser from parameters; Adam with a learning rate of
            2e-3 by default.
        held_out: The share of held-out examples, in (0, 1); equal examples stay in the same
            split. A data set has its own validation examples.
        ema: The decay of the weights' average, in [0, 1).
        condition_dropout: The probability with which each condition of a training example is
            replaced by "none", in [0, 1): see :mod:`scoresde.train.dropout`.
        seed: Seed of the split, the batches, the times and the noise.
        device: The device to train on; by default the model's.
        folder: Folder for the best weights so far, for :func:`scoresde.load`; it is created if
            necessary.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Raises:
        InputError: If an argument is out of range, the data do not match the model, or the final
            loss is not finite; if the folder holds a checkpoint, or the model cannot be
            described as a recipe.

    Example:
        >>> from scoresde import ScoreModel, VPSDE
        >>> from scoresde.nn import MLP
        >>> x = torch.randn(100, 2)
        >>> model = fit(ScoreModel(MLP(2, width=8), VPSDE()), x, steps=2, progress=False)
    """
    check_model(model, Trainable)
    loss = DenoisingScoreMatching() if loss is None else loss
    loss.check(model)
    model = model if device is None else model.to(device)
    source = _source(data, held_out, seed)
    check_levels(loss, source)
    if isinstance(model, NeuralCodec) and isinstance(data, Dataset):
        check_units(source.codec, model)
    _warn(source, model, loss)
    training = Training(
        steps=steps, batch_size=batch_size, ema=ema, condition_dropout=condition_dropout
    )
    check_dropout(model, source, condition_dropout)
    keep = _keeper(model, source, folder, seed, training, loss)
    adam = functools.partial(torch.optim.Adam, lr=2e-3)
    update = Update(model, loss, training, optimizer or adam, seed=seed)
    average, size = update.averages[0].model, min(batch_size, len(source.train))
    least, best, every = math.inf, None, max(1, min(500, steps // _CHECKS))
    bar = Progress(steps, "training", "step", shown=progress, lines=False, leave=True)
    model.train()
    for step, batch in enumerate(islice(batches(source, size, seed), steps)):
        x = model.state(batch.x.to(model.device))
        update(x, loss.select(model, batch.cond), step, size)
        bar.update()
        if (step + 1) % every == 0 or step + 1 == steps:
            value = validation_loss(average, source, loss, seed)
            bar.note(f"held out {value:.4g}")
            bar.say(f"step {step + 1} of {steps}, held out {value:.4g}")
            if value < least:
                least, best = value, copy.deepcopy(average.state_dict())
                keep(model.state_dict(), best, step + 1)
    bar.close()
    if best is None:
        raise InputError(
            f"The held-out loss must be finite, got {value}; pass an optimizer with a lower "
            "learning rate, or check the data."
        )
    average.load_state_dict(best)
    return cast(Kind, average)


def _source(data: Data, held_out: float, seed: int) -> Dataset:
    """Returns a data set unchanged, and converts examples in model units to a data set."""
    if isinstance(data, Dataset):
        return data
    pair = data if isinstance(data, tuple) else (data, {})
    if len(pair) != 2 or not isinstance(pair[1], Mapping):
        raise InputError(
            "data must be a pair of floats and a mapping of conditions, got a tuple of "
            f"{', '.join(type(part).__name__ for part in pair)}; pass (x, {{'label': labels}})."
        )
    x, cond = pair
    if not isinstance(x, Tensor):
        raise InputError(
            f"data must be a Dataset, floats (N, *) or floats with conditions, got "
            f"{type(x).__name__}; use torch.as_tensor for arrays."
        )
    check_data(x)
    for name, values in cond.items():
        if not isinstance(values, Tensor) or values.shape[:1] != x.shape[:1]:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"{name} must be a tensor with a row for each of {len(x)} examples, got {shape}."
            )
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be in (0, 1), got {held_out}.")
    x = x if x.dtype == torch.float64 else x.float()
    kept, rest = split_indices(x, (1 - held_out, held_out), seed)

    def splits(values: Tensor) -> list[Tensor]:
        return [values[rows.to(values.device)] for rows in (kept, rest, rest)]

    conditions = {name: splits(values) for name, values in cond.items()}
    return Dataset.of("data", splits(x), standardise=False, conditions=conditions)


def _keeper(
    model: Trainable,
    data: Dataset,
    folder: str | Path | None,
    seed: int,
    training: Training,
    loss: Loss,
) -> Callable[[dict[str, Any], dict[str, Any], int], None]:
    """Returns a callable that writes weights, averages and the update count, if requested."""
    if folder is None:
        return lambda weights, averages, done: None
    if not isinstance(folder, str | Path) or not str(folder):
        raise InputError(
            f"folder must be the path of a folder, such as 'runs/mine', got {folder!r}."
        )
    place = Path(folder).expanduser()
    if (place / NAME).exists():
        raise InputError(
            f"folder must not contain a checkpoint, got {place} with {NAME}; use another folder."
        )
    recipe = {"name": data.name, "model": describe(model), "units": data.codec.describe()}
    if training.condition_dropout:  # for loading: whether "none" was trained
        recipe["train"] = describe(training)
    cautions = loss.cautions(model, data.conditions_of("train", slice(1)))
    recipe |= {"cautions": cautions} if cautions else {}
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"folder must be writable, got {place} ({error.strerror}); use another folder."
        ) from error

    def keep(weights: dict[str, Any], averages: dict[str, Any], done: int) -> None:
        Checkpoint(recipe, weights, averages, done, seed).save(place / NAME)

    return keep


def _warn(data: Dataset, model: Trainable, loss: Loss) -> None:
    """Warns if conditions or scales of the data do not match the model."""
    found = check_conditions(model, data)
    found += loss.cautions(model, data.conditions_of("train", slice(1)))
    if isinstance(model, ScoreFunction):
        found += check_scales(data, model.sde, loss.first_time(model.sde))
    for sentence in found:
        warnings.warn(sentence, stacklevel=3)
