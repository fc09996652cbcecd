"""Trackers of training metrics: ``metrics.jsonl`` and external services."""

import importlib
import json
import logging
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoresde.errors import InputError

log = logging.getLogger("scoresde")

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """Description of a run for its trackers.

    Arguments:
        name: The name of its recipe.
        folder: The folder of the run.
        start: The number of updates done before; later records are dropped.
        recipe: Plain values that describe the run.
    """

    name: str
    folder: Path
    start: int
    recipe: Mapping[str, Any]

    def token(self, tracker: str) -> str:
        """Returns a name for the run that is the same after a resume."""
        path = self.folder / f".{tracker}_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


class Tracker(ABC):
    """Base class for trackers, which record the numbers and pictures of a training run."""

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Called once before the first number."""

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Records numbers at a step."""

    def image(self, step: int, name: str, path: Path) -> None:  # noqa: B027 - optional
        """Records a picture, a PNG file."""

    @abstractmethod
    def close(self) -> None:
        """Called once after the last number."""


class JSONLines(Tracker):
    """Writes ``metrics.jsonl``; a number that is not finite becomes null."""

    def begin(self, run: Run) -> None:
        _cut(run.folder / METRICS, run.start)
        self.file = (run.folder / METRICS).open("a", encoding="utf-8")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        values = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard(Tracker):
    """Writes events of TensorBoard to the run's folder."""

    def begin(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.events.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.events.add_image(
                name, np.asarray(picture.convert("RGB")), step, dataformats="HWC"
            )

    def close(self) -> None:
        self.events.close()


class WandB(Tracker):
    """Weights & Biases.

    Arguments:
        project: The project.
        mode: ``online``, ``offline`` or ``disabled``. If None, its environment decides.
    """

    def __init__(self, project: str = "scoresde", mode: str | None = None) -> None:
        self.project, self.mode = project, mode
        self.library = _library("wandb")

    def begin(self, run: Run) -> None:
        self.run = self.library.init(
            project=self.project,
            mode=self.mode,
            name=run.name,
            id=run.token("wandb"),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.recipe),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """MLflow.

    Arguments:
        experiment: The experiment.
        uri: Address of its server or database. If None, its environment decides.
    """

    def __init__(self, experiment: str = "scoresde", uri: str | None = None) -> None:
        self.experiment, self.uri = experiment, uri
        self.library = _library("mlflow")

    def begin(self, run: Run) -> None:
        self.client = self.library.tracking.MlflowClient(tracking_uri=self.uri)
        found = self.client.get_experiment_by_name(self.experiment)
        number = found.experiment_id if found else self.client.create_experiment(self.experiment)
        path = run.folder / ".mlflow_id"
        if not path.exists():
            made = self.client.create_run(number, run_name=run.name)
            path.write_text(made.info.run_id, encoding="utf-8")
            for key, value in _flat(run.recipe).items():
                self.client.log_param(made.info.run_id, key, str(value)[:250])
        self.id = path.read_text(encoding="utf-8").strip()
        self.client.update_run(self.id, status="RUNNING")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            # MLflow does not allow a plus sign in names.
            self.client.log_metric(self.id, name.replace("+", ""), value, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.client.log_artifact(self.id, str(path), name)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio(Tracker):
    """trackio, which stores its numbers on this machine.

    Arguments:
        project: The project.
    """

    def __init__(self, project: str = "scoresde") -> None:
        self.project = project
        self.library = _library("trackio")

    def begin(self, run: Run) -> None:
        self.library.init(
            project=self.project,
            name=f"{run.name}-{run.token('trackio')[:8]}",
            resume="allow",
            config=dict(run.recipe),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.library.log(dict(numbers), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self.library.log({name: self.library.Image(str(path))}, step=step)

    def close(self) -> None:
        self.library.finish()


class Trackers:
    """The trackers of a run: ``metrics.jsonl`` and others. A failing one does not stop training.

    Arguments:
        run: The run.
        others: The other trackers.
    """

    def __init__(self, run: Run, others: Sequence[Tracker] = ()) -> None:
        self.first = JSONLines()
        self.first.begin(run)
        self.others = list(others)
        self._ask("begin", run)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Records numbers at a step."""
        self.first.log(step, numbers)
        self._ask("log", step, numbers)

    def image(self, step: int, name: str, path: Path) -> None:
        """Records a picture."""
        self._ask("image", step, name, path)

    def close(self) -> None:
        """Closes all trackers."""
        self.first.close()
        self._ask("close")

    def _ask(self, act: str, *values: Any) -> None:
        for tracker in list(self.others):
            try:
                getattr(tracker, act)(*values)
            except Exception as error:  # networks, disks, servers
                self.others.remove(tracker)
                name = type(tracker).__name__
                log.warning("%s failed; training continues without it: %s", name, error)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f'The tracker {name} is not installed; run pip install "scoresde[{name}]".'
        ) from error


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{path}.{key}" if path else str(key))
    return leaves


# --- metrics.jsonl -------------------------------------------------------------------------------


def _cut(path: Path, start: int) -> None:
    """Drops the records after a step, and an incomplete line left by a killed run."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _records(path) if record["step"] <= start]
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Returns the undamaged records of ``metrics.jsonl``; an empty list without a file."""
    path = folder / METRICS
    return _records(path) if path.exists() else []


def _records(path: Path) -> list[dict[str, float]]:
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
