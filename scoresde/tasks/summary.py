"""The table of a sweep: one row for each job."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Columns of a row that are results, not settings.
_OUTCOMES = (
    *("job", "status", "error", "count", "nfe", "seconds"),
    *("density", "coverage", "expected_coverage"),
)


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Collects the jobs of a sweep and writes ``summary.csv``.

    Arguments:
        folder: The sweep's folder, with a folder for each job that holds its ``result.json``.

    Returns:
        A row for each job: its number, its overrides, its status (``ok``, ``failed``, or
        ``interrupted`` if it has no result) and its results or its error.
    """
    jobs = [path for path in folder.iterdir() if path.is_dir() and (path / "result.json").exists()]
    rows = [_row(path) for path in sorted(jobs, key=_order)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw_quality(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path | None:
    """Draws ``quality.png``, density by coverage, of jobs that were compared with data.

    Arguments:
        rows: The rows of :func:`summarise`.
        folder: The sweep's folder.

    Returns:
        The figure; None if fewer than two jobs were compared.
    """
    from scoresde.report.figures import quality

    found = [row for row in rows if "density" in row and "coverage" in row]
    if len(found) < 2:
        return None
    swept = [
        name
        for name in found[0]
        if name.partition("@")[0] not in _OUTCOMES
        and len({str(row.get(name)) for row in found}) > 1
    ]
    labels = [", ".join(f"{name}={row.get(name)}" for name in swept) for row in found]
    points = [(row["coverage"], row["density"]) for row in found]
    expected = [row["expected_coverage"] for row in found]
    return quality(points, labels, sum(expected) / len(expected), folder / "quality.png")


def _order(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else 0, path.name)


def _row(path: Path) -> dict[str, Any]:
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        result = None
    result = result if isinstance(result, dict) else {}
    overrides = dict(text.partition("=")[::2] for text in result.pop("overrides", []))
    status, _ = result.pop("status", "interrupted"), result.pop("task", None)
    status = "interrupted" if status == "running" else status
    return {"job": path.name, "status": status, **overrides, **result}


def format_table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] | None = None) -> str:
    """Lays rows out as text, with aligned columns; numbers are rounded to four digits."""
    rows = list(rows)
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
