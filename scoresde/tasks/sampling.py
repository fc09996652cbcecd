"""Sampling from a model in batches, with results saved batch by batch."""

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
_TRACED = 8  # samples with a plotted trajectory


def at_time(sampler: Sampler, t: float) -> Sampler:
    """Returns the sampler for a model trained at a single time.

    Raises:
        InputError: If the sampler evaluates the model at other times.
    """
    if not isinstance(sampler, LangevinDynamics):
        raise InputError(
            f"sampler must be LangevinDynamics for a model that was trained at one noise level, "
            f"got {type(sampler).__name__}; use sampler=langevin."
        )
    return replace(sampler, eps=t)


@dataclass(frozen=True)
class Drawing:
    """A sampling job: the model, the sampler and their inputs.

    Arguments:
        model: The model.
        sampler: The sampler.
        codec: The codec, which converts samples to raw examples.
        seed: Seed of the random streams.
        latents: The initial states, ``(N, *)`` in model units. If None, they are drawn.
        cond: Conditions, used in turn for the samples, each with shape ``(M, *)``.
        class_names: The names of the classes, if any.
    """

    model: ScoreFunction
    sampler: Sampler
    codec: Codec
    seed: int
    latents: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    class_names: Sequence[str] = ()

    def batch(self, piece: range, progress: bool = False) -> Columns:
        """Draws the samples of a batch, on the CPU and in model units.

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
        if log_det is None:  # the codec has no density of raw data
            return {}
        found = {"log_prob": samples.log_prob.double().cpu() + log_det}
        if samples.standard_error is not None:
            found["log_prob_error"] = samples.standard_error.double().cpu()
        return found

    def conditions(self, piece: range) -> dict[str, Any]:
        """Returns the conditions of a batch, on the model's device."""
        indices = torch.arange(piece.start, piece.stop)
        return self.model.select({k: v[indices % len(v)] for k, v in self.cond.items()})

    def start(self, piece: range) -> Tensor:
        """Returns the initial states of a batch, on the model's device."""
        if self.latents is not None:
            return self.latents[piece.start : piece.stop].to(self.model.device)
        shape = (len(piece), *self.codec.shape)
        return self.sampler.latent(self.model, shape, seed=self.seed, seeds=piece)


@dataclass(frozen=True)
class Drawn:
    """Samples and their cost.

    Arguments:
        x: The samples in model units, with shape ``(count, *)``.
        nfe: The network evaluations of each sample, int64 ``(count,)``.
        seconds: The total wall-clock time.
        seed: The seed.
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
        codec: The codec, which converts samples to raw examples.
        count: The number of samples, positive.
        batch_size: The number of samples drawn together, positive.
        seed: Seed of the random streams.
        cond: Conditions, used in turn for the samples, each with shape ``(M, *)``.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Raises:
        InputError: If a number is not positive, the sampler does not support the model, or a
            sample is not finite.
    """
    seed = fresh_seed() if seed is None else seed
    drawing = Drawing(model, sampler, codec, seed, cond=cond or {})
    parts = draw_batches(drawing, check_count("count", count), batch_size, progress)
    table = {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    x, nfe, seconds = (table.pop(name) for name in ("x", "nfe", "seconds"))
    return Drawn(x, nfe, float(seconds.sum()), drawing.seed, table)


def draw_batches(drawing: Drawing, count: int, size: int, progress: bool) -> list[Columns]:
    """Draws samples in batches; shows progress by steps (one batch) or samples (several)."""
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
        folder: Output folder.
        name: The name of the files.
        reference: Raw real examples ``(N, *)`` that determine the plotted range.
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
    """Draws any number of samples in the memory of one batch, saving each batch.

    At the end ``samples.npz`` holds all samples, in the format of :func:`save_samples`, and their
    conditions. ``samples.png`` shows some of the samples.

    Arguments:
        drawing: The sampling job.
        count: The number of samples, positive.
        folder: Output folder.
        parts: Store of finished batches, from which available batches are read.
        batch_size: The number of samples drawn together, positive.
        images: Whether each sample is also written to a file ``images/00000017.png``.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Returns:
        The mean NFE and the total seconds.

    Raises:
        InputError: If ``images`` is set and the data are not images, or as for
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
    """Plots samples; samples of several classes are grouped by class."""
    view, labels = view_of(drawing.codec), drawing.conditions(range(len(raw))).get("label")
    if labels is None or len(labels.unique()) == 1:
        view.picture(raw, path)
    else:
        view.by_class(titled(raw, labels.cpu(), drawing.class_names), path)


def save_trajectory(drawing: Drawing, points: int, count: int, folder: Path) -> None:
    """Saves the trajectories of the first samples: ``trajectory.npz`` and ``trajectory.png``.

    The file holds times ``t`` ``(T, B)``, and states ``x`` and denoised estimates ``denoised``,
    ``(T, B, *)``, in model units. Images are plotted as strips, two rows for each sample, and
    points in the plane as paths. Other data have no picture.

    Arguments:
        drawing: The sampling job.
        points: The number of states per trajectory, at least 2.
        count: The number of samples; at most eight are used.
        folder: Output folder.
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
            f"{bad} of {len(x)} samples are not finite, because the model or the sampler "
            "diverged; check the training, or use more steps or a larger eps."
        )
