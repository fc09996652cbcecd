"""One thread for each process: two pools of threads on two cores wait for each other."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from scoresde.report import figures as plots

collect_ignore = ["make_old_checkpoints.py"]  # it ran with an older release
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start
torch.set_num_threads(1)


# Their tests share what is costly to make: one process runs them all.
TOGETHER = ("test_distributed.py", "test_evaluation.py", "test_readme.py", "test_run.py")


class Together(LoadScopeScheduling):
    """Gives tests out one by one, but for files that stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(TOGETHER) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """Has tests with a costly fixture run in one process (see xdist's manual)."""
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has figures built and not rendered, which takes half of a short run of the program."""

    def blank(figure: Any, path: Path) -> Path:
        Image.new("RGB", (8, 8)).save(plots._folder(path), format="png")
        return Path(path)

    monkeypatch.setattr(plots, "_save", blank)
