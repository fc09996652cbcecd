"""Latents of data, and interpolation between latents."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import Codec
from scoresde.data import Batch, Dataset, _arrays
from scoresde.errors import InputError
from scoresde.model import ScoreFunction
from scoresde.report import figures as plots
from scoresde.sample import ProbabilityFlow, Sampler, slerp
from scoresde.tasks.evaluation import rows_of
from scoresde.tasks.parts import Columns, Parts, write_whole
from scoresde.tasks.sampling import Drawing, draw_batches, is_image
from scoresde.tasks.tables import collect


def encode_data(
    model: ScoreFunction,
    sampler: Sampler,
    data: Dataset,
    split: str,
    folder: Path,
    parts: Parts,
    *,
    examples: int | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, float]:
    """Computes the latents of data, and writes ``latents.npz``.

    It holds ``x`` in model units, ``nfe``, the ``index`` of each example, and its conditions.
    Integers are placed at the centres of their levels, so decoding recovers them.

    Arguments:
        model: The model.
        sampler: A :class:`~scoresde.sample.ProbabilityFlow`.
        data: The data.
        split: ``train``, ``validation`` or ``test``.
        folder: Output folder.
        parts: Store of finished batches, from which available batches are read.
        examples: The number of examples, chosen at random, positive. If None, all are used.
        batch_size: The number of examples encoded together, positive.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Returns:
        The mean NFE and the total seconds.

    Raises:
        InputError: If the sampler is not invertible, or there is no such split.
    """
    if not isinstance(sampler, ProbabilityFlow):
        raise InputError(
            f"sampler must be a ProbabilityFlow, which can be inverted, got "
            f"{type(sampler).__name__}; use sampler=probability_flow."
        )
    values = data.split(split)
    rows = rows_of(len(values), examples, parts)

    def compute(piece: range) -> Columns:
        clock = time.perf_counter()
        mine = rows[piece.start : piece.stop]
        raw = values[mine.to(values.device)]
        x = data.codec.encode(raw.to(model.device))
        cond = model.select(data.conditions_of(split, mine))
        latent = sampler.encode(model, x, **cond)
        seconds = (time.perf_counter() - clock) / len(piece)
        each = torch.full((len(piece),), seconds, dtype=torch.float64)
        told = {name: values.cpu() for name, values in cond.items()}
        return {"x": latent.x.cpu(), "nfe": latent.nfe.cpu(), "seconds": each, **told}

    path, count = folder / "latents.npz", len(rows)
    table = collect(path, parts, count, batch_size, compute, progress, index=rows.numpy())
    return {"nfe": float(table["nfe"].double().mean()), "seconds": float(table["seconds"].sum())}


def read_latents(path: Path, codec: Codec) -> Batch:
    """Reads latents written by :func:`encode_data`, float32 ``(N, *)``, and conditions.

    Raises:
        InputError: If the file has no latents, or latents of another shape.
    """
    try:
        with path.open("rb") as stream, _arrays.load(stream) as file:
            latents = torch.from_numpy(file["x"])
            names = [name for name in file.files if name not in ("x", "nfe", "index")]
            cond = {name: torch.from_numpy(file[name]) for name in names}
    except Exception as error:  # a damaged file can fail in any parser
        raise InputError(
            f"latents must contain an array x, got {path} ({error}); use latents.npz of "
            "task=encode."
        ) from error
    if latents.ndim == 0 or tuple(latents.shape[1:]) != tuple(codec.shape) or len(latents) == 0:
        raise InputError(
            f"latents must have shape (N, {', '.join(map(str, codec.shape))}), N >= 1, got "
            f"{tuple(latents.shape)} in {path}; use latents of this model."
        )
    if not latents.is_floating_point() or not bool(latents.isfinite().all()):
        raise InputError(
            f"latents must be finite and floating-point, got other values of {latents.dtype} in "
            f"{path}; use latents.npz of task=encode."
        )
    odd = [name for name, values in cond.items() if values.shape[:1] != latents.shape[:1]]
    if odd:
        raise InputError(
            f"{odd[0]} of latents={path} must have a row for each of {len(latents)} latents, got "
            f"shape {tuple(cond[odd[0]].shape)}; use latents.npz of task=encode."
        )
    return Batch(latents.float(), cond)


def interpolate_latents(
    drawing: Drawing, count: int, points: int, folder: Path, *, batch_size: int, progress: bool
) -> dict[str, float]:
    """Draws samples between pairs of latents: ``interpolation.npz`` and ``interpolation.png``.

    The ends are samples 2 i and 2 i + 1 of the sampling job, or these rows of its latents. Between
    them the latents follow an arc (:func:`~scoresde.sample.slerp`). The file holds ``x`` in raw
    units, ``(count, points, *)``, and the ``share`` of the second latent.

    Arguments:
        drawing: The sampling job.
        count: The number of pairs, positive.
        points: The number of samples from one end to the other, at least 2.
        folder: Output folder.
        batch_size: The number of samples drawn together, positive.
        progress: Whether to show the progress (see :mod:`scoresde.progress`).

    Returns:
        The mean NFE.
    """
    if points < 2:
        raise InputError(f"points must be at least 2, got {points}.")
    ends = drawing.start(range(2 * count))
    share = torch.linspace(0, 1, points, dtype=torch.float64, device=ends.device)
    between = slerp(ends[::2], ends[1::2], share).flatten(0, 1)
    pairs = {k: v.repeat_interleave(points, 0) for k, v in _of_pairs(drawing, count).items()}
    inner = Drawing(drawing.model, drawing.sampler, drawing.codec, drawing.seed, between, pairs)
    table = draw_batches(inner, len(between), batch_size, progress)
    x, nfe = (torch.cat([columns[name] for columns in table]) for name in ("x", "nfe"))
    raw = drawing.codec.decode(x).unflatten(0, (count, points))
    arrays = {"x": raw.numpy(), "share": share.cpu().numpy()}
    write_whole(folder / "interpolation.npz", lambda file: np.savez(file, **arrays))
    if is_image(drawing.codec):
        plots.image_grid(drawing.codec.to_unit(x), folder / "interpolation.png", columns=points)
    elif tuple(drawing.codec.raw_shape) == (2,):
        plots.trajectories(
            1 - share.cpu(), raw.transpose(0, 1).float(), folder / "interpolation.png"
        )
    return {"nfe": float(nfe.double().mean())}


def _of_pairs(drawing: Drawing, count: int) -> dict[str, Tensor]:
    """Returns the conditions of pairs of samples; for given latents, those of the first ends.

    Raises:
        InputError: If the conditions of the ends of a pair differ.
    """
    if drawing.latents is None:
        return drawing.conditions(range(count))
    ends = drawing.conditions(range(2 * count))
    for name, values in ends.items():
        if not torch.equal(values[::2], values[1::2]):
            raise InputError(
                f"{name} must be the same for both ends of a pair of latents; set one, such as "
                "label=3."
            )
    return {name: values[::2] for name, values in ends.items()}
