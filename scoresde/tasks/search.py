"""Hyper-parameter search with Optuna; all training runs are in one folder."""

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from scoresde.errors import InputError
from scoresde.report import figures as plots
from scoresde.tasks.summary import format_table
from scoresde.train import TrainingStopped

log = logging.getLogger("scoresde")

STUDY, TABLE, FIGURE, BEST = "study.jsonl", "summary.csv", "search.png", "experiment/best.yaml"
_FOLDER, _ERROR = "folder", "error"  # attributes of a trial
METRICS = ("bits_per_dim", "nats")

Objective = Callable[[dict[str, Any], Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """An interval of numbers, including its ends; whole numbers if both ends are.

    Arguments:
        low: The lower end.
        high: The upper end.
        log: Whether to search the logarithm.
    """

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Any, name: str) -> float:
        """Returns the value chosen by Optuna."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        choose = trial.suggest_int if whole else trial.suggest_float
        return choose(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """A choice between values.

    Arguments:
        values: The values.
    """

    values: Sequence[Any]

    def suggest(self, trial: Any, name: str) -> Any:
        """Returns the value chosen by Optuna."""
        return trial.suggest_categorical(name, self.values)


def space_of(tree: Mapping[str, Any], path: str = "") -> dict[str, Interval | Choice]:
    """Returns the search space, by dotted names.

    Arguments:
        tree: Values at their keys in the configuration: a list is a choice; a mapping of ``low``,
            ``high`` and optionally ``log`` is an interval.
        path: The key of the tree.

    Raises:
        InputError: If a value is neither.
    """
    space: dict[str, Interval | Choice] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        match value:
            case list() if value and all(not isinstance(v, list | dict) for v in value):
                space[name] = Choice(value)
            case {"low": int() | float() as low, "high": int() | float() as high, **rest}:
                logarithm = rest.pop("log", False)
                if rest or not low < high or not isinstance(logarithm, bool):
                    raise InputError(
                        f"search.space.{name} must be an interval with low < high and log true "
                        f"or false, such as '{{low:1e-4,high:1e-2,log:true}}', got {value}."
                    )
                if logarithm and low <= 0:
                    raise InputError(
                        f"search.space.{name}.low must be positive for log=true, got {low}."
                    )
                space[name] = Interval(low, high, logarithm)
            case dict() if value and "low" not in value and "high" not in value:
                space |= space_of(value, f"{name}.")
            case _:
                raise InputError(
                    f"search.space.{name} must be a list of values such as [a,b,c], or an "
                    f"interval such as '{{low:1e-4,high:1e-2,log:true}}', got {value}."
                )
    return space


@dataclass(frozen=True)
class Search:
    """A search, which can be resumed and shared by several processes.

    Arguments:
        space: The search space.
        trials: The number of training runs, positive.
        folder: Folder for all results.
        metric: The result to optimise. If None, bits/dim or nats.
        direction: ``minimize`` or ``maximize``.
        sampler: Optuna's sampler. If None, Optuna's default.
        seed: The seed of the sampler.
    """

    space: Mapping[str, Interval | Choice]
    trials: int
    folder: Path
    metric: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: Any = None
    seed: int = 0

    def run(self, objective: Objective) -> dict[str, Any]:
        """Trains until all trials are done; returns the best one.

        Arguments:
            objective: Callable that trains with values in a folder and returns results.

        Raises:
            InputError: If Optuna is missing, or every trial failed.
        """
        study = self._study()
        self._again(study)
        while len(_counted(study)) < self.trials:
            self._try(study.ask(), study, objective)
        self._save(study)
        done = [t for t in study.trials if t.value is not None]
        if not done:
            first = next(t.user_attrs[_ERROR] for t in study.trials if _ERROR in t.user_attrs)
            raise InputError(f"All {len(study.trials)} trials failed; the first error: {first}")
        best = study.best_trial
        return {"trials": len(done), "best_value": best.value, "best": _texts(best.params)}

    def _study(self) -> Any:
        try:
            import optuna
        except ImportError as error:
            raise InputError(
                'task=search requires Optuna; run pip install "scoresde[search]".'
            ) from error
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if self.direction not in ("minimize", "maximize"):
            raise InputError(
                f"search.direction must be minimize or maximize, got {self.direction}."
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY)))
        study = optuna.create_study(
            study_name="search", storage=storage, direction=self.direction, load_if_exists=True
        )
        # A resumed search must not draw the same numbers again.
        seed = self.seed + len(study.trials)
        study.sampler = self.sampler or optuna.samplers.TPESampler(seed=seed)
        return study

    def _again(self, study: Any) -> None:
        """Requeues trials whose process has died; their training resumes."""
        from optuna.trial import TrialState

        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            folder = trial.user_attrs.get(_FOLDER)
            lock = None if folder is None else _hold(self.folder / folder)
            if folder is not None and lock is None:
                continue  # another process is working on it
            study.enqueue_trial(trial.params, user_attrs={_FOLDER: folder} if folder else None)
            study.tell(trial.number, state=TrialState.PRUNED)  # not counted
            if lock is not None:
                lock.close()

    def _try(self, trial: Any, study: Any, objective: Objective) -> None:
        from optuna.trial import TrialState

        values = {name: part.suggest(trial, name) for name, part in self.space.items()}
        name = trial.user_attrs.get(_FOLDER) or f"trial_{trial.number:04d}"
        trial.set_user_attr(_FOLDER, name)
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        log.info("Trial %d: %s", trial.number, " ".join(_texts(values)))
        with _hold(folder) or (folder / ".lock").open("ab"):
            try:
                study.tell(trial, self._value(objective(values, folder)))
            except TrainingStopped:  # also stops the search, which resumes with this trial
                raise
            except Exception as error:  # the other trials continue
                log.error("Trial %d failed: %s", trial.number, error)
                trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}"[:300])
                study.tell(trial, state=TrialState.FAIL)

    def _value(self, results: Mapping[str, Any]) -> float:
        name = self.metric or next((m for m in METRICS if m in results), None)
        value = results.get(name) if name is not None else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            there = ", ".join(k for k, v in results.items() if isinstance(v, int | float))
            raise InputError(f"search.metric must be one of {there}, got {name}.")
        if not math.isfinite(value):
            raise InputError(f"{name} must be finite, got {value}.")
        return float(value)

    def _save(self, study: Any) -> None:
        rows = [
            {
                "trial": t.number,
                "status": "ok" if t.value is not None else "failed",
                "value": t.value,
                **t.params,
                "folder": t.user_attrs.get(_FOLDER),
                "error": t.user_attrs.get(_ERROR),
            }
            for t in _counted(study)
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (self.folder / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        log.info(
            "%s", format_table([{k: "" if v is None else v for k, v in r.items()} for r in rows])
        )
        done = [row for row in rows if row["value"] is not None]
        if not done:
            return
        plots.search(done, list(self.space), self.folder / FIGURE, self.direction == "minimize")
        path = self.folder / BEST
        path.parent.mkdir(exist_ok=True)
        path.write_text(_recipe(study.best_trial.params), encoding="utf-8")
        log.info("Best: %s", " ".join(_texts(study.best_trial.params)))
        log.info("Train it: --config-dir %s +experiment=best", self.folder)


def _counted(study: Any) -> list[Any]:
    """Returns the finished and running trials, without those that were requeued."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)
    return study.get_trials(states=states)


def _hold(folder: Path) -> IO[bytes] | None:
    """Locks a trial's folder for this process; returns None if another process holds it."""
    folder.mkdir(exist_ok=True)
    file = (folder / ".lock").open("ab")
    try:
        import fcntl  # not everywhere

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):
        pass
    return file


def _texts(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def _recipe(values: Mapping[str, Any]) -> str:
    """Returns the values as a recipe."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return "# @package _global_\n" + json.dumps(tree, indent=2) + "\n"
