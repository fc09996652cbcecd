"""Report of a training run: samples of three samplers, likelihoods, figures."""

import json
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde
from scoresde.codec import LatentCodec
from scoresde.data import Dataset, random_rows
from scoresde.errors import InputError
from scoresde.likelihood import LogProb
from scoresde.loss import Loss, only_time
from scoresde.metrics import (
    MOST_FEATURES,
    Baseline,
    Estimate,
    gaussian_baseline,
    mixture_baseline,
    subset,
)
from scoresde.model import ScoreFunction, ScoreModel
from scoresde.report import Figure, Report, SamplerResult, Score, Table, write_report
from scoresde.report import figures as plots
from scoresde.sample import LangevinDynamics, Sampler, Step
from scoresde.streams import Streams
from scoresde.tasks.classes import by_class, class_figure, class_table, each_class, labels_of
from scoresde.tasks.comparison import Neighbours, compare
from scoresde.tasks.evaluation import Evaluation, evaluate_likelihood, has_density, in_units
from scoresde.tasks.parts import Parts
from scoresde.tasks.sampling import Drawing, Drawn, at_time, draw_samples, save_samples
from scoresde.tasks.schedule import schedule_figure
from scoresde.tasks.verdict import divergence, overfitting
from scoresde.tasks.views import Images, Points, View, view_of
from scoresde.train import level_curves, read_metrics, validation_losses
from scoresde.train.checkpoint import BEST

log = logging.getLogger("scoresde")

_BASELINE_SEED = 0
_PIXELS = 96
_IN_MEMORY = 2**24  # bytes of examples above which only some are kept in memory
_ARROWS = 22  # on a side, of a score
_SCORE_LEVEL = 0.1  # noise level of a plotted score, relative to the data's size
_PATHS = 64
_NEIGHBOURS, _PAIRS = 256, 8  # samples whose nearest training examples are found, and are drawn
_SHARE, _LEAST = 0.1, 5.0  # of the training's seconds that the baselines take, and at least
_OWN = "this model"


@dataclass(frozen=True)
class Trained:
    """A trained model with the facts of its training.

    Arguments:
        name: The recipe's name.
        model: The model with averaged weights.
        data: The data set, on the model's device.
        seconds: The training time in seconds.
        seed: The seed of the training.
        facts: Further facts for the report, as pairs of label and value.
        configuration: The whole configuration as YAML.
        split: The split for the evaluation: ``test``, or ``validation`` if the results select
            models.
        loss: The training loss; None if it does not matter.
        none: Whether the model was trained on "no class".
    """

    name: str
    model: ScoreFunction
    data: Dataset
    seconds: float
    seed: int
    facts: Sequence[tuple[str, str]] = ()
    configuration: str = ""
    split: str = "test"
    loss: Loss | None = None
    none: bool = False

    @property
    def conditional(self) -> bool:
        """True if the model accepts conditions of the data."""
        return bool(self.model.select(self.data.conditions_of(self.split, slice(1))))

    @property
    def evaluable(self) -> bool:
        """True if examples have a likelihood: the codec has a density, the model all times."""
        return has_density(self.data) and only_time(self.loss, self.model.process) is None

    @property
    def held_out(self) -> Tensor:
        """The raw examples for the evaluation, on the CPU; a subset if there are very many."""
        return in_memory(self.data, self.split)

    def rows(self, count: int) -> Tensor:
        """Returns random indices of held-out examples whose conditions samples use."""
        return random_rows(len(self.data.split(self.split)), count)


def report_training(
    trained: Trained,
    samplers: Mapping[str, Sampler],
    likelihood: LogProb,
    folder: Path,
    *,
    count: int = 64,
    examples: int | None = None,
    batch_size: int = 256,
    baselines: bool = True,
    progress: bool = True,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Samples and evaluates a trained model; writes figures and ``report.html``.

    Arguments:
        trained: The model.
        samplers: The samplers by name.
        likelihood: The likelihood for held-out data.
        folder: The run's folder, with the training's ``metrics.jsonl``.
        count: The number of samples per sampler.
        examples: The number of held-out examples to evaluate. If None, all are used.
        batch_size: The number of examples sampled or evaluated together.
        baselines: Whether to fit classical densities as baselines.
        progress: Whether to show progress bars.
        parts: Store of finished batches for processes that share the evaluation; the first
            process writes the report.

    Returns:
        The numerical results; empty in all processes but the first. If the codec of the data has
        no density, no likelihood is evaluated.
    """
    model, data, seed = trained.model, trained.data, trained.seed
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}

    def evaluate() -> Evaluation:
        return evaluate_likelihood(
            model, likelihood, data, trained.split, examples=examples, parts=parts, **options
        )

    known = trained.evaluable
    samplers = suitable(samplers, trained)
    if parts is not None and parts.rank.index > 0:
        if known:
            evaluate()
        return {}
    view = view_of(data.codec, in_memory(data, "train"))
    drawn = {}
    for name, sampler in samplers.items():
        drawn[name] = draw_samples(
            model,
            sampler,
            data.codec,
            count,
            cond=data.conditions_of(trained.split, trained.rows(count)),
            **options,
        )
        save_samples(drawn[name], data.codec, folder, name, view.reference)
    evaluation = evaluate() if known else None
    scores: list[Score] = []
    if evaluation is not None:
        evaluation.save(folder)
        scores = [_own_score(evaluation), *(_baselines(trained) if baselines else ())]
    scores += _exact(trained)

    raw = {_title(name): data.decode(d.x) for name, d in drawn.items()}
    tables, pictures = _compared(trained, view, raw, folder, count)
    tables += _class_tables(trained, evaluation)
    figures = [
        *_class_pictures(trained, samplers, drawn, view, folder, options),
        *pictures,
        *(
            _plane_figures(trained, samplers, view, likelihood, folder)
            if isinstance(view, Points)
            else ()
        ),
        Figure(
            "The loss in training (faint: as recorded) and on validation data.",
            plots.loss_curve(read_metrics(folder), folder / "loss.png"),
        ),
        *_level_figures(trained, folder),
        *schedule_figure(model, data, trained.loss, seed, folder),
        *([] if evaluation is None else [_histogram(trained, evaluation, folder)]),
    ]
    remarks = _remarks(folder, scores)
    for remark in remarks:
        log.warning("%s", remark)
    write_report(
        Report(
            title=trained.name,
            subtitle=f"{type(model.sde).__name__} on {data.name}",
            facts=_facts(trained),
            real=_real(trained, view, folder, count),
            samplers=_sampler_rows(samplers, drawn, folder),
            scores=scores,
            figures=figures,
            configuration=trained.configuration,
            remarks=remarks,
            tables=tables,
        ),
        folder / "report.html",
    )
    return _results(trained, drawn, evaluation, scores)


def suitable(samplers: Mapping[str, Sampler], trained: Trained) -> dict[str, Sampler]:
    """Returns the samplers for a model; for a single noise level, Langevin dynamics."""
    only = only_time(trained.loss, trained.model.process)
    if only is None:
        return dict(samplers)
    left = [n for n, sampler in samplers.items() if not isinstance(sampler, LangevinDynamics)]
    if left:
        log.warning(
            "The loss trains the model at one noise level, where it has no likelihood. Skipped "
            "samplers: %s. Use samplers such as langevin, or times over all levels.",
            ", ".join(left),
        )
    kept = {name: sampler for name, sampler in samplers.items() if name not in left}
    return {name: at_time(sampler, only) for name, sampler in kept.items()}


def _compared(
    trained: Trained, view: View, raw: Mapping[str, Tensor], folder: Path, count: int
) -> tuple[list[Table], list[Figure]]:
    """Compares raw samples with data, in tables and pictures."""
    if not raw:
        return [], []
    data, reference = trained.data, in_memory(trained.data, "train")
    enough = len(trained.held_out) >= count  # a picture of few held-out examples shows little
    name, real = (trained.split, trained.held_out) if enough else ("training", reference)
    panels = {f"{name} data": subset(real, count), **raw}
    picture = view.compare(panels, folder / "comparison.png")
    figures = [Figure(f"{name.title()} data next to the samples.", picture)]
    sets = {"training data": reference, **{name.lower(): x for name, x in raw.items()}}
    tables = [compare(sets, view.feature, folder / "statistics.csv")]
    name, some = next((name, x[:_NEIGHBOURS]) for name, x in raw.items())
    held_out = subset(trained.held_out, _NEIGHBOURS)
    found = Neighbours.of(data.codec, reference, some, held_out)
    near = reference[found.rows[:_PAIRS]]
    rows = [
        [str(i + 1), f"training example {row}", f"{distance:.3g}"]
        for i, (row, distance) in enumerate(
            zip(found.rows[:_PAIRS].tolist(), found.distances.tolist(), strict=False)
        )
    ]
    about = f"{found.sentence} Samples: {name.lower()}."
    tables.append(
        Table("Nearest training examples", about, ("sample", "nearest", "distance"), rows)
    )
    pairs = view.neighbours(some[:_PAIRS], near, found.distances[:_PAIRS], folder / "nearest.png")
    if pairs is not None:
        caption = "Samples above their nearest training examples, with distances in model units."
        figures.append(Figure(caption, pairs))
    return tables, figures


def _class_pictures(
    trained: Trained,
    samplers: Mapping[str, Sampler],
    drawn: Mapping[str, Drawn],
    view: View,
    folder: Path,
    options: Mapping[str, Any],
) -> list[Figure]:
    """Draws samples of each class with the sampler of fewest network evaluations."""
    model, data = trained.model, trained.data
    if not drawn or "label" not in model.select(data.conditions_of(trained.split, slice(1))):
        return []
    name = min(drawn, key=lambda name: float(drawn[name].nfe.double().mean()))
    labels = each_class(model, data, trained.none, view.each)
    cond = {**data.conditions_of(trained.split, trained.rows(len(labels))), "label": labels}
    found = draw_samples(model, samplers[name], data.codec, len(labels), cond=cond, **options)
    raw, path = data.decode(found.x), folder / "classes.png"
    return [class_figure(view, raw, labels, data.class_names, path)]


def _class_tables(trained: Trained, evaluation: Evaluation | None) -> list[Table]:
    """Returns the likelihood and the validation loss of each class, if there are classes."""
    model, data = trained.model, trained.data
    columns = {}
    if evaluation is not None:
        columns[f"{evaluation.unit}, {trained.split}"] = evaluation.classes
    if trained.loss is not None:
        rows, losses = validation_losses(model, data, trained.loss, trained.seed)
        labels = labels_of(model, data, "validation", rows)
        columns["loss, validation"] = {} if labels is None else by_class(losses, labels)
    columns = {title: column for title, column in columns.items() if column}
    return [class_table(columns, data.class_names)] if columns else []


def _remarks(folder: Path, scores: Sequence[Score]) -> list[str]:
    """Returns the warnings at the top of the report."""
    own = [score for score in scores if score.name == _OWN]
    said = [overfitting(read_metrics(folder), (folder / BEST).is_file())]
    said += [divergence(score, scores) for score in own]
    return [text for text in said if text]


def _level_figures(trained: Trained, folder: Path) -> list[Figure]:
    if only_time(trained.loss, trained.model.process) is not None:
        return []
    about = "The error of the expected noise at each noise level: 1 is that of a guess of zero."
    curves = level_curves(read_metrics(folder))
    return [Figure(about, plots.level_curve(curves, folder / "levels.png"))]


def _histogram(trained: Trained, evaluation: Evaluation, folder: Path) -> Figure:
    values = {trained.split: evaluation.values}
    picture = plots.histogram(values, folder / "values.png", evaluation.unit)
    return Figure(f"{trained.split.title()} examples by their {evaluation.unit}.", picture)


def _results(
    trained: Trained,
    drawn: Mapping[str, Drawn],
    evaluation: Evaluation | None,
    scores: Sequence[Score],
) -> dict[str, Any]:
    return {
        "data": trained.data.name,
        **({} if evaluation is None else _graded(evaluation)),
        **{_key(score.name): score.value for score in scores if score.name != _OWN},
        **{f"nfe_{name}": float(d.nfe.double().mean()) for name, d in drawn.items()},
        **{f"seconds_{name}": d.seconds for name, d in drawn.items()},
        "seconds_training": trained.seconds,
    }


def _graded(evaluation: Evaluation) -> dict[str, Any]:
    return {
        evaluation.unit.replace("/", "_per_"): evaluation.mean,
        "examples": len(evaluation.values),
        "standard_error": evaluation.standard_error,
        "likelihood_nfe": evaluation.summary()["nfe"],
    }


def _key(name: str) -> str:
    return "exact" if "exact" in name else "mixture" if "mixture" in name.lower() else "gaussian"


def _own_score(evaluation: Evaluation) -> Score:
    nfe = evaluation.summary()["nfe"]
    return Score(
        _OWN,
        evaluation.mean,
        evaluation.standard_error,
        evaluation.unit,
        f"NFE {nfe:.0f}, {evaluation.seconds:.0f} s for {len(evaluation.values)} examples",
    )


def _baselines(trained: Trained) -> list[Score]:
    """Fits classical densities to the same training set, in a share of the training time."""
    data = trained.data
    if (features := math.prod(data.shape)) > MOST_FEATURES:
        log.info(
            "No baselines: an example has %d features, and a covariance is fitted to at most %d.",
            features,
            MOST_FEATURES,
        )
        return []
    train, validation, held_out = (
        data.batch(split, Streams.of(_BASELINE_SEED, batch=len(in_memory(data, split)))).x.cpu()
        for split in ("train", "validation", trained.split)
    )
    start, budget = time.monotonic(), max(_LEAST, _SHARE * trained.seconds)

    def left() -> float:
        return max(0.0, budget - (time.monotonic() - start))

    fits = [
        lambda: gaussian_baseline(train, held_out),
        lambda: mixture_baseline(train, validation, held_out, seconds=left()),
    ]
    log_det = data.log_det(trained.held_out, held_out)
    scores = []
    for fit in fits:
        try:
            scores.append(_baseline_score(fit(), trained, log_det))
        except InputError as error:
            log.info("Skipped a baseline: %s", error)
    return scores


def _baseline_score(fit: Baseline, trained: Trained, log_det: Tensor | None) -> Score:
    values, unit, _ = in_units(fit.log_prob, trained.data, log_det)
    estimate = Estimate.of(values)
    notes = [
        "fitted to the same training set",
        "without conditions" if trained.conditional else "",
    ]
    note = ", ".join(filter(None, [*notes, fit.note]))
    if fit.note:
        log.info("Baseline %s: %s.", fit.name, fit.note)
    return Score(fit.name, estimate.mean, estimate.standard_error, unit, note)


def _exact(trained: Trained) -> list[Score]:
    """Scores the exact density of the data, if known: no model can be better.

    A conditional model can be better, since its density is conditional.
    """
    data = trained.data
    known = data.conditional_log_prob if trained.conditional else data.log_prob
    if known is None:
        return []
    cond = data.conditions_of(trained.split) if trained.conditional else {}
    values = known(trained.held_out, **{name: values.cpu() for name, values in cond.items()})
    estimate = Estimate.of(-values)
    return [
        Score("exact density", estimate.mean, estimate.standard_error, "nats", "the best possible")
    ]


def _sampler_rows(
    samplers: Mapping[str, Sampler], drawn: Mapping[str, Drawn], folder: Path
) -> list[SamplerResult]:
    return [
        SamplerResult(
            _title(name),
            _settings(samplers[name]),
            float(d.nfe.double().mean()),
            d.seconds,
            folder / f"{name}.png",
        )
        for name, d in drawn.items()
    ]


def _title(name: str) -> str:
    return name.replace("_", " ").title()


def _settings(sampler: Sampler) -> str:
    """Describes a sampler by its settings that are plain numbers or words."""
    values = {name: getattr(sampler, name) for name in sampler.__dataclass_fields__}
    plain = {
        k: v for k, v in values.items() if isinstance(v, int | float | str) and v is not False
    }
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def _real(trained: Trained, view: View, folder: Path, count: int) -> Figure | None:
    if not isinstance(view, Images):
        return None
    picture = view.picture(subset(trained.held_out, count), folder / "real.png")
    return Figure(f"Real {trained.split} examples", picture)


def _facts(trained: Trained) -> list[tuple[str, str]]:
    model, data = trained.model, trained.data
    sizes = " / ".join(str(len(data.split(s))) for s in ("train", "validation", "test"))
    parameters = sum(p.numel() for p in model.parameters())
    network = type(model.network if isinstance(model, ScoreModel) else model).__name__
    return [
        ("SDE", str(model.sde)),
        ("network", f"{network}, {parameters:,} parameters"),
        ("data", f"{data.name}: {sizes} examples of shape {data.shape}"),
        *trained.facts,
        ("training time", f"{trained.seconds:.0f} s"),
        ("seed", str(trained.seed)),
        ("device", _device(model.device)),
        ("versions", f"scoresde {scoresde.__version__}, torch {torch.__version__}"),
        ("date", time.strftime("%Y-%m-%d %H:%M")),
    ]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _plane_figures(
    trained: Trained,
    samplers: Mapping[str, Sampler],
    view: Points,
    likelihood: LogProb,
    folder: Path,
) -> list[Figure]:
    """Draws the score and the density of two-dimensional data, and the paths of samples."""
    figures = []
    if not trained.conditional and not isinstance(trained.data.codec, LatentCodec):
        figures.append(_score_figure(trained, view.extent(), folder))
    exact = trained.evaluable and not trained.data.codec.stochastic
    if exact and likelihood.levels is None and not trained.conditional:
        figures.append(_density_figure(trained, view.extent(), likelihood, folder))
    for name, sampler in samplers.items():
        times, paths = _record(trained, sampler)
        figure = plots.trajectories(times, paths, folder / f"paths_{name}.png")
        figures.append(Figure(f"Paths from noise to data: {_title(name).lower()}.", figure))
    return figures


def _score_figure(trained: Trained, extent: plots.Extent, folder: Path) -> Figure:
    """Plots the score in raw units, over the density or a histogram of the data."""
    model, data = trained.model, trained.data
    t = _score_time(trained)
    with torch.no_grad():
        alpha, sigma = (float(c(t)) for c in (model.sde.alpha, model.sde.sigma))
    level = sigma / alpha
    raw = _grid(extent, _ARROWS).requires_grad_()
    points = alpha * data.codec.encode(raw)
    with torch.no_grad():
        score = model.score(model.state(points), t.to(model.device)).to(points)
    (score,) = torch.autograd.grad(points, raw, score)  # chain rule: per raw unit
    known = data.log_prob
    path = plots.score_field(
        score.reshape(_ARROWS, _ARROWS, 2),
        extent,
        folder / "score.png",
        None if known is None else known(_grid(extent, _PIXELS)).reshape(_PIXELS, _PIXELS),
        in_memory(data, "train").float() if known is None else None,
    )
    under = "training data" if known is None else "log-density of the data"
    return Figure(
        f"The score of the model (arrows) at the relative noise {level:.2g}, over the {under}. "
        "Short arrows grow with the score; no arrow is longer than a cell of the grid.",
        path,
    )


def _score_time(trained: Trained) -> Tensor:
    """Returns the time of the plotted score, with noise of a tenth of the data's size."""
    sde, loss = trained.model.sde, trained.loss
    only = only_time(loss, sde)
    if only is not None:
        return torch.tensor(only, dtype=torch.float64)
    first = sde.cutoffs.training if loss is None else loss.first_time(sde)
    level = torch.tensor(_SCORE_LEVEL * trained.data.sigma_data, dtype=torch.float64)
    with torch.no_grad():
        return sde.time(-2 * level.log().to(trained.model.device)).clamp(first, 1.0).cpu()


def _grid(extent: plots.Extent, count: int) -> Tensor:
    """Returns the centres of equal cells, lowest row first, ``(count * count, 2)``."""
    places = (torch.arange(count) + 0.5) / count
    x, y = (low + (high - low) * places for low, high in (extent[:2], extent[2:]))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _density_figure(
    trained: Trained, extent: plots.Extent, likelihood: LogProb, folder: Path
) -> Figure:
    data = trained.data
    x = torch.linspace(extent[0], extent[1], _PIXELS)
    y = torch.linspace(extent[2], extent[3], _PIXELS)
    raw = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    points = data.codec.encode(raw).to(trained.model.device)
    values = [
        likelihood(trained.model, part, seed=0).log_prob.cpu() for part in points.split(4096)
    ]
    log_det = data.log_det(raw, points.cpu())
    log_density = -in_units(torch.cat(values), data, log_det)[0].reshape(_PIXELS, _PIXELS)
    exact = None if data.log_prob is None else data.log_prob(raw).reshape(_PIXELS, _PIXELS)
    path = plots.density(log_density, extent, folder / "density.png", exact=exact)
    return Figure(
        "The model's density" + (" next to the exact one." if exact is not None else "."), path
    )


def in_memory(data: Dataset, split: str) -> Tensor:
    """Returns raw examples on the CPU: all, or a random subset of at most 16 MiB."""
    raw = data.split(split)
    if isinstance(raw, Tensor):
        return raw.cpu()
    size = raw.numel() // len(raw) * raw.dtype.itemsize
    return raw.cpu()[random_rows(len(raw), max(1, _IN_MEMORY // size))]


def _record(trained: Trained, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Returns the times ``(T, B)`` and the raw states ``(T, B, 2)`` of a few samples' paths."""
    times, states = [], []

    def remember(step: Step) -> None:
        times.append(step.t.cpu().expand(_PATHS))
        states.append(trained.data.decode(step.x.cpu(), rounded=False))

    codec = trained.data.codec
    known = trained.data.conditions_of(trained.split, trained.rows(_PATHS))
    drawing = Drawing(trained.model, sampler, codec, trained.seed, cond=known)
    cond = drawing.conditions(range(_PATHS))
    shape = (_PATHS, *trained.data.shape)
    sampler(trained.model, shape, seed=trained.seed, callback=remember, **cond)
    return torch.stack(times), torch.stack(states)


def save_result(folder: Path, result: Mapping[str, Any], rank: int = 0) -> None:
    """Writes ``result.json`` atomically; of several processes, only the first writes."""
    if rank > 0:
        return
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / "result.json")
