"""Report of an autoencoder: its bound in two terms, reconstructions and latents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.codec import VAE, Autoencoder, NeuralCodec
from scoresde.data import Dataset, random_rows
from scoresde.metrics import Estimate, bits_per_dim
from scoresde.report import Figure, Report, Table, write_report
from scoresde.report import figures as plots
from scoresde.streams import Purpose, Streams
from scoresde.tasks.evaluation import in_units
from scoresde.tasks.report import Trained
from scoresde.tasks.views import view_of
from scoresde.train import read_metrics

_SHOWN, _DRAWN = 32, 64
_ACTIVE = 0.01  # minimum mean information of an active latent, in nats


@torch.no_grad()
def evaluate_vae(
    vae: VAE,
    data: Dataset,
    split: str,
    *,
    examples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns the bound of the examples of a split and its terms, in float64 on the CPU.

    Arguments:
        vae: The autoencoder.
        data: The data.
        split: The split.
        examples: The number of examples, chosen at random. If None, all are used.
        batch_size: The number of examples evaluated together.
        seed: Seed of the latents.

    Returns:
        ``index``, ``value``, ``reconstruction`` and ``kl``, each ``(N,)``, and ``kls``. ``value``
        is in bits/dim of integers, or in nats (the negative bound of the log-density in raw
        units). ``reconstruction`` and ``kl`` are in nats of model units, and ``kls`` is the mean
        divergence of each latent, in nats.
    """
    rows = random_rows(len(data.split(split)), examples)
    parts: list[dict[str, Tensor]] = []
    for part in rows.split(batch_size):
        streams = Streams(seed, part.to(vae.device))
        x = data.batch(split, streams).x.to(vae.device)
        found = vae.elbo(x, seed=seed, seeds=part.tolist())
        raw = data.split(split)[part.to(data.split(split).device)]
        parts.append(
            {
                "value": _in_units(found.value.double(), data, vae, raw, x).cpu(),
                "reconstruction": found.reconstruction.double().cpu(),
                "kl": found.kl.double().cpu(),
                "kls": found.kls.double().cpu(),
            }
        )
    table = {name: torch.cat([columns[name] for columns in parts]) for name in parts[0]}
    return {"index": rows, **table, "kls": table["kls"].mean(0)}


def _in_units(value: Tensor, data: Dataset, vae: VAE, raw: Tensor, x: Tensor) -> Tensor:
    """Returns bounds in bits/dim, or in nats of raw units; lower is better."""
    if vae.data_levels is not None:  # of the levels themselves
        return bits_per_dim(value, data.raw_shape, 1.0)
    return in_units(value, data, data.log_det(raw, x))[0]


@torch.no_grad()
def report_autoencoder(
    trained: Trained, folder: Path, *, examples: int | None = None, batch_size: int = 256
) -> dict[str, Any]:
    """Writes ``bound.json``, ``bound.npz`` and ``report.html`` of a trained autoencoder.

    Arguments:
        trained: The autoencoder with the facts of its training.
        folder: The run's folder, with the training's ``metrics.jsonl``.
        examples: The number of held-out examples to evaluate. If None, all are used.
        batch_size: The number of examples evaluated together.

    Returns:
        The results in numbers.
    """
    model, data, split = trained.model, trained.data, trained.split
    assert isinstance(model, NeuralCodec)
    view = view_of(data.codec, trained.held_out)
    rows = random_rows(len(data.split(split)), _SHOWN)
    batch = data.batch(split, Streams(trained.seed, rows)).x.to(model.device)
    raw = data.split(split)[rows.to(data.split(split).device)].cpu()
    panels = {
        f"{split} data": raw,
        "decoded": data.decode(model.decode(model.encode(batch)).cpu()),
    }
    if isinstance(model, VAE):
        z = Streams.of(trained.seed, batch=_DRAWN).normal(model.shape, Purpose.LATENT)
        panels["drawn from N(0, I)"] = data.decode(model.decode(z).cpu())
    figures = [
        Figure(
            "Held-out examples, their reconstructions from the mean latents"
            + (", and latents of N(0, I), decoded." if isinstance(model, VAE) else "."),
            view.compare(panels, folder / "comparison.png"),
        ),
        Figure(
            "The loss in training (faint: as recorded) and on validation data.",
            plots.loss_curve(read_metrics(folder), folder / "loss.png"),
        ),
    ]
    options: dict[str, Any] = {"examples": examples, "batch_size": batch_size}
    results: dict[str, Any]
    tables: list[Table]
    if isinstance(model, VAE):
        results, tables = _bound(model, trained, folder, options)
    else:
        results, tables = _error(model, trained, options), []
    write_report(
        Report(
            title=trained.name,
            subtitle=f"{type(model).__name__} on {data.name}",
            facts=_facts(trained, model),
            tables=tables,
            figures=figures,
            configuration=trained.configuration,
        ),
        folder / "report.html",
    )
    return {"data": data.name, **results, "seconds_training": trained.seconds}


def _bound(
    vae: VAE, trained: Trained, folder: Path, options: dict[str, Any]
) -> tuple[dict[str, Any], list[Table]]:
    """Evaluates the bound, and writes the results."""
    table = evaluate_vae(vae, trained.data, trained.split, seed=trained.seed, **options)
    arrays: dict[str, Any] = {name: values.numpy() for name, values in table.items()}
    np.savez(folder / "bound.npz", **arrays)
    unit = "nats" if trained.data.levels is None else "bits/dim"
    estimates = {name: Estimate.of(table[name]) for name in ("value", "reconstruction", "kl")}
    active = int((table["kls"] > _ACTIVE).sum())
    results = {
        unit.replace("/", "_per_"): estimates["value"].mean,
        "standard_error": estimates["value"].standard_error,
        "examples": len(table["index"]),
        **{name: estimates[name].mean for name in ("reconstruction", "kl")},
        "active_latents": active,
        "latents": table["kls"].numel(),
    }
    (folder / "bound.json").write_text(json.dumps(results, indent=1) + "\n")
    names = {
        "value": (f"negative bound, {unit}", "lower is better"),
        "reconstruction": ("reconstruction, nats", "of the decoder, summed over values"),
        "kl": ("divergence from N(0, I), nats", "of the encoder, summed over latents"),
    }
    cells = [
        (title, about, f"{estimates[name].mean:.4f} ± {estimates[name].standard_error:.4f}")
        for name, (title, about) in names.items()
    ]
    about = f"{active} of {results['latents']} latents carry more than {_ACTIVE} nats."
    return results, [Table("Evidence lower bound", about, ("term", "", "mean"), cells)]


def _error(model: NeuralCodec, trained: Trained, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the mean squared error of a plain autoencoder, in model units."""
    assert isinstance(model, Autoencoder)
    rows = random_rows(len(trained.data.split(trained.split)), options["examples"])
    errors = []
    for part in rows.split(options["batch_size"]):
        x = trained.data.batch(trained.split, Streams(trained.seed, part)).x
        errors.append(model.squared_error(x.to(model.device)).double().cpu())
    found = Estimate.of(torch.cat(errors))
    return {"squared_error": found.mean, "standard_error": found.standard_error}


def _facts(trained: Trained, model: NeuralCodec) -> list[tuple[str, str]]:
    numbers = sum(p.numel() for p in model.parameters())
    return [
        ("networks", f"{numbers:,} parameters"),
        ("latents", f"{tuple(model.shape)} of examples {tuple(model.raw_shape)}"),
        *trained.facts,
        ("training time", f"{trained.seconds:.0f} s"),
        ("seed", str(trained.seed)),
    ]
