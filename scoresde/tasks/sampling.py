"""Drawing samples of a model, and saving them as they come."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.errors import InputError, check_count
from scoresde.model import ScoreFunction
from scoresde.progress import Progress
from scoresde.sample import LangevinDynamics, Sampler, Samples, sample_trajectory
from scoresde.streams import fresh_seed
from scoresde.tasks.classes import titled
from scoresde.tasks.image_files import ImageFiles
from scoresde.tasks.parts import Columns, Parts, gather, write_whole
from scoresde.tasks.tables import collect, first_rows
from scoresde.tasks.views import is_image, raw_states, view_of

__all__ = [
    "Drawing",
    "Drawn",
    "at_time",
    "draw_samples",
    "is_image",
    "raw_states",
    "save_samples",
    "save_trajectory",
    "stream_samples",
]

log = logging.getLogger("scoresde")

_DRAWN = 256  # samples in a picture
_TRACED = 8  # samples whose way is drawn


def at_time(sampler: Sampler, t: float) -> Sampler:
    """Returns a sampler for a model that was trained at one time.

    Raises:
        InputError: If it evaluates a model at other times.
    """
    if not isinstance(sampler, LangevinDynamics):
        raise InputError(
            f"sampler must be LangevinDynamics for a model that was trained at one noise level, "
            f"got {type(sampler).__name__}; use sampler=langevin."
        )
    return replace(sampler, eps=t)


@dataclass(frozen=True)
class Drawing:
    """What samples are drawn from, and how.

    Arguments:
        model: The model.
        sampler: The sampler.
        codec: The way from what is drawn to raw examples.
        seed: Names the random streams.
        latents: What the samples start from, ``(N, *)`` in model units; ``None``: the streams.
        cond: The conditions that the samples take in turn, each with shape ``(M, *)``.
        class_names: What the classes are called, if they have names.
    """

    model: ScoreFunction
    sampler: Sampler
    codec: Codec
    seed: int
    latents: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    def batch(self, piece: range, progress: bool = False) -> Columns:
        """Draws the samples of a piece, on the CPU and in model units.

        Raises:
            InputError: If a sample is not finite.
        """
        clock = time.perf_counter()
        samples = self.sampler(
            self.model,
            latent=self.start(piece),
            seed=self.seed,
            seeds=piece,
            progress=progress,
            **self.conditions(piece),
        )
        x = samples.x.cpu()
        _check_finite(x)
        seconds = (time.perf_counter() - clock) / len(piece)
        return {
            "x": x,
            "nfe": samples.nfe.cpu(),
            "seconds": torch.full((len(piece),), seconds, dtype=torch.float64),
            **self.densities(samples),
        }

    def densities(self, samples: Samples) -> Columns:
        """Returns the log-densities of samples in raw units, and their errors, if known."""
        if samples.log_prob is None:
            return {}
        if self.codec.stochastic:  # the latents of a sample are not a draw of its encoder
            return {}
        x = samples.x.cpu()
        log_det = self.codec.log_det(self.codec.decode(x), x)
        if log_det is None:  # the codec knows no density of raw data
            return {}
        found = {"log_prob": samples.log_prob.double().cpu() + log_det}
        if samples.standard_error is not None:
            found["log_prob_error"] = samples.standard_error.double().cpu()
        return found

    def conditions(self, piece: range) -> dict[str, Any]:
        """Returns the conditions of a piece, on the model's device."""
        indices = torch.arange(piece.start, piece.stop)
        return self.model.select({k: v[indices % len(v)] for k, v in self.cond.items()})

    def start(self, piece: range) -> Tensor:
        """Returns the latents of a piece, on the model's device."""
        if self.latents is not None:
            return self.latents[piece.start : piece.stop].to(self.model.device)
        shape = (len(piece), *self.codec.shape)
        return self.sampler.latent(self.model, shape, seed=self.seed, seeds=piece)


@dataclass(frozen=True)
class Drawn:
    """Samples, and what they cost.

    Arguments:
        x: The samples in model units, with shape ``(count, *)``.
        nfe: The network passes of each, int64 ``(count,)``.
        seconds: The wall-clock time in all.
        seed: The seed that was used.
        densities: The log-densities in nats and raw units, and their errors, by name, if known.
    """

    x: Tensor
    nfe: Tensor
    seconds: float
    seed: int
    densities: Columns = field(default_factory=dict)


def draw_samples(
    model: ScoreFunction,
    sampler: Sampler,
    codec: Codec,
    count: int,
    *,
    batch_size: int = 256,
    seed: int | None = None,
    cond: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> Drawn:
    """Draws samples in batches; sample ``i`` does not depend on the size of the batches.

    Arguments:
        model: The model.
        sampler: The sampler.
        codec: The way from what is drawn to raw examples.
        count: The number of samples, positive.
        batch_size: The number of samples drawn together, positive.
        seed: Names the random streams.
        cond: The conditions that the samples take in turn, each with shape ``(M, *)``.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Raises:
        InputError: If a number is not positive, the sampler does not fit the model, or a sample
            is not finite.
    """
    seed = fresh_seed() if seed is None else seed
    drawing = Drawing(model, sampler, codec, seed, cond=cond or {})
    parts = draw_batches(drawing, check_count("count", count), batch_size, progress)
    table = {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    x, nfe, seconds = (table.pop(name) for name in ("x", "nfe", "seconds"))
    return Drawn(x, nfe, float(seconds.sum()), drawing.seed, table)


def draw_batches(drawing: Drawing, count: int, size: int, progress: bool) -> list[Columns]:
    """Draws samples in batches; shows the steps of a single one, and of several the samples."""
    alone, batches = count <= size, []
    with Progress(count, "sampling", "sample", shown=progress and not alone) as bar:
        pieces = gather(None, count, size, lambda p: drawing.batch(p, progress and alone))
        for piece, columns, _ in pieces:
            batches.append(columns)
            bar.update(len(piece))
    return batches


def save_samples(
    drawn: Drawn,
    codec: Codec,
    folder: Path,
    name: str = "samples",
    reference: Tensor | None = None,
) -> None:
    """Saves ``name.npz`` (raw units, NFE, seed, densities) and a picture ``name.png``.

    Arguments:
        drawn: The samples.
        codec: The codec of the data.
        folder: Where to write.
        name: The name of the files.
        reference: Raw real examples ``(N, *)`` that set what of the samples is in view.
    """
    raw = codec.decode(drawn.x)
    path, seed = folder / f"{name}.npz", np.uint64(drawn.seed)
    known: dict[str, Any] = {k: values.numpy() for k, values in drawn.densities.items()}
    np.savez(path, x=raw.numpy(), nfe=drawn.nfe.numpy(), seed=seed, **known)
    view_of(codec, reference).picture(raw, folder / f"{name}.png")


def stream_samples(
    drawing: Drawing,
    count: int,
    folder: Path,
    parts: Parts,
    *,
    batch_size: int = 256,
    images: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Draws any number of samples, each saved with its batch, in the memory of one batch.

    At the end ``samples.npz`` holds them all, as :func:`save_samples` writes them, and their
    conditions; ``samples.png`` shows some of them.

    Arguments:
        drawing: What to draw.
        count: The number of samples, positive.
        folder: Where to write.
        parts: Where finished batches are kept and, if they are there, read.
        batch_size: The number of samples drawn together, positive.
        images: Whether each sample becomes a file ``images/00000017.png`` too.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Returns:
        The mean NFE and the seconds in all.

    Raises:
        InputError: If the data are no images and ``images`` asks for some, or as for
            :func:`draw_samples`.
    """
    codec, alone = drawing.codec, count <= batch_size
    files = ImageFiles(codec) if images else None

    def compute(piece: range) -> Columns:
        columns = drawing.batch(piece, progress and alone)
        raw = codec.decode(columns["x"])
        if files is not None:
            files.save(raw, folder / "images", piece)
        return {**columns, "x": raw}

    path, seed = folder / "samples.npz", np.uint64(drawing.seed)
    shown = progress and not alone
    known = {k: c.cpu().numpy() for k, c in drawing.conditions(range(count)).items()}
    table = collect(path, parts, count, batch_size, compute, shown, seed=seed, **known)
    if parts.rank.index == 0:
        _picture(drawing, first_rows(path, _DRAWN), folder / "samples.png")
        if files is not None and files.note:
            log.info("%s", files.note)
    return {"nfe": float(table["nfe"].double().mean()), "seconds": float(table["seconds"].sum())}


def _picture(drawing: Drawing, raw: Tensor, path: Path) -> None:
    """Draws samples, and those of several classes by class."""
    view, labels = view_of(drawing.codec), drawing.conditions(range(len(raw))).get("label")
    if labels is None or len(labels.unique()) == 1:
        view.picture(raw, path)
    else:
        view.by_class(titled(raw, labels.cpu(), drawing.class_names), path)


def save_trajectory(drawing: Drawing, points: int, count: int, folder: Path) -> None:
    """Saves the way of the first samples: ``trajectory.npz`` and ``trajectory.png``.

    The file holds times ``t`` ``(T, B)``, and states ``x`` and expected data ``denoised``,
    ``(T, B, *)``, in model units. Images make strips, two rows for each sample; of points in the
    plane the paths are drawn; other data have no picture.

    Arguments:
        drawing: What to draw.
        points: How many states of each, at least 2.
        count: How many samples there are; at most eight are taken.
        folder: Where to write.
    """
    piece, model = range(min(count, _TRACED)), drawing.model
    _, way = sample_trajectory(
        model,
        drawing.sampler,
        drawing.start(piece),
        points=points,
        seed=drawing.seed,
        seeds=piece,
        **drawing.conditions(piece),
    )
    arrays = {name: getattr(way, name).numpy() for name in ("t", "x", "denoised")}
    write_whole(folder / "trajectory.npz", lambda file: np.savez(file, **arrays))
    view_of(drawing.codec).trajectory(way, model, folder / "trajectory.png")


def _check_finite(x: Tensor) -> None:
    bad = int((~x.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(x)} samples are not finite: the model or the sampler has diverged; "
            "check the training, or use more steps or a larger eps."
        )
