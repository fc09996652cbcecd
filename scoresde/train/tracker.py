"""Where a training's numbers go: a line of JSON each, and TensorBoard."""

import json
import math
from pathlib import Path


class Tracker:
    """Writes numbers to ``metrics.jsonl`` and to TensorBoard events in a folder.

    Arguments:
        folder: The run's folder.
        tensorboard: Whether to write TensorBoard events.
        start: The step that the training begins after; what was recorded beyond it, by a run that
            was killed later than its last checkpoint, is dropped.
    """

    def __init__(self, folder: Path, tensorboard: bool = True, start: int = 0) -> None:
        _cut(folder / "metrics.jsonl", start)
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, **values: float) -> None:
        """Records numbers at a step; one that is not finite is recorded as null."""
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def _cut(path: Path, start: int) -> None:
    """Drops the records beyond a step, and a line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            early = json.loads(line)["step"] <= start
        except (ValueError, KeyError, TypeError):
            continue
        kept += [line + "\n"] if early else []
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Reads the records of ``metrics.jsonl``; none if there is no such file."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
