"""List of the runs below a folder, with their state, progress and results."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.errors import InputError
from scoresde.tasks.folder import held
from scoresde.tasks.summary import format_table
from scoresde.train import read_metrics

_METRICS = ("bits_per_dim", "nats", "accuracy")
_RESULT, _CONFIG = "result.json", ".hydra/config.yaml"


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each run below a folder, newest first.

    ``state`` is ``ok``, ``failed``, ``stopped`` or ``running``, as in ``result.json``. If it is
    ``running`` but no process works in the folder, ``state`` is ``killed``. It is ``damaged`` if
    the file is.

    Raises:
        InputError: If there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"The argument of scoresde runs must be a folder with runs, such as runs, got "
            f"{folder}."
        )
    paths = sorted(folder.rglob(_RESULT), key=lambda path: path.stat().st_mtime, reverse=True)
    return [_row(path.parent, folder) for path in paths]


def describe_runs(folder: Path, as_json: bool = False) -> str:
    """Returns the runs below a folder as a table, or as JSON."""
    rows = list_runs(folder)
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return f"{folder} holds no runs."
    return format_table([{k: "" if v is None else v for k, v in row.items()} for row in rows])


def _row(run: Path, folder: Path) -> dict[str, Any]:
    result = _read(run / _RESULT)
    losses = [
        r["validation_loss"]
        for r in read_metrics(run)
        if isinstance(r.get("validation_loss"), int | float)
    ]
    metric = next((name for name in _METRICS if name in result), None)
    return {
        "run": str(run.relative_to(folder)),
        "task": result.get("task"),
        "state": _state(run, result),
        "step": _steps(run),
        "validation_loss": losses[-1] if losses else None,
        "best_loss": min(losses) if losses else None,
        "metric": None if metric is None else f"{result[metric]:.4g} {metric}",
        "minutes": _minutes(run),
        "error": str(result["error"])[:60] if "error" in result else None,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}


def _state(run: Path, result: Mapping[str, Any]) -> str:
    state = result.get("status", "damaged")
    return "killed" if state == "running" and not held(run) else str(state)


def _steps(run: Path) -> str | None:
    """Returns the recorded and the total number of updates."""
    done = max((r["step"] for r in read_metrics(run)), default=None)
    if done is None:
        return None
    try:
        import yaml

        config = yaml.safe_load((run / _CONFIG).read_text(encoding="utf-8"))
        return f"{done:g}/{config['train']['steps']}"
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return f"{done:g}"


def _minutes(run: Path) -> float:
    """Returns the minutes between the first and the last file of a run."""
    times = [path.stat().st_mtime for path in run.iterdir() if path.is_file()]
    config = run / _CONFIG
    first = config.stat().st_mtime if config.exists() else min(times, default=time.time())
    return round((max(times, default=first) - first) / 60, 1)
