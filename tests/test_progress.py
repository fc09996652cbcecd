"""A bar on a terminal, a few lines elsewhere, and nothing where nothing is asked for."""

import io
import logging
import re
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scoresde
from scoresde import VPSDE, GaussianModel, Likelihood, ScoreModel, fit
from scoresde.data import folder as image_folder
from scoresde.data import two_moons
from scoresde.nn import MLP
from scoresde.progress import Progress, silent
from scoresde.sample import DDIM, ProbabilityFlow
from scoresde.tasks import evaluate_likelihood
from scoresde.tasks.sampling import draw_samples
from scoresde.train import Training, train

ROOT = Path(scoresde.__file__).parent


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lines(caplog, capsys):
    """Returns the lines of the log; nothing else is written."""
    caplog.set_level(logging.INFO, logger="scoresde")

    def read():
        assert capsys.readouterr().err == ""
        return [record.getMessage() for record in caplog.records]

    return read


exact = GaussianModel(torch.zeros(2), 0.5, VPSDE())


def model():
    torch.manual_seed(0)
    return ScoreModel(MLP(2, width=8, depth=1), VPSDE())


def sampled(progress, folder):
    DDIM(100)(exact, (2, 2), seed=0, progress=progress)


def solved(progress, folder):
    ProbabilityFlow(rtol=1e-9, atol=1e-9)(exact, (2, 2), seed=0, progress=progress)


def drawn(progress, folder):
    data = two_moons(count=100)
    draw_samples(exact, DDIM(2), data.codec, 40, batch_size=2, seed=0, progress=progress)


def fitted(progress, folder):
    fit(model(), two_moons(count=100), steps=20, progress=progress)


def evaluated(progress, folder):
    data = two_moons(count=100)
    evaluate_likelihood(
        exact, Likelihood(rtol=0.1), data, "train", batch_size=2, progress=progress
    )


def trained(progress, folder):
    options = Training(steps=20, batch_size=16, log_every=5)
    loss = scoresde.DenoisingScoreMatching()
    train(
        model(), two_moons(count=100), loss, options, torch.optim.Adam, folder, progress=progress
    )


def decoded(progress, folder):
    for i in range(40):
        grey = np.full((8, 8), i, dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"{i}.png")
    with silent(not progress):
        image_folder(folder, 8)


ACTS = {
    sampled: ("sampling: 20 of 100 steps", 5),
    solved: ("sampling: 1. steps", 6),
    drawn: ("sampling: 8 of 40 samples", 5),
    fitted: ("training: step 1 of 20, held out ", 20),
    evaluated: ("likelihood: 16 of 80 examples", 5),
    trained: ("training: step 5 of 20, loss ", 4),
    decoded: ("decoding: 8 of 40 images", 5),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()


@pytest.mark.parametrize("act", ACTS)
def test_without_a_terminal_there_are_a_few_lines(act, lines, tmp_path):
    first, most = ACTS[act]
    act(True, tmp_path / "out")
    assert re.match(first, lines()[0])
    assert 1 < len(lines()) <= most


@pytest.mark.parametrize("act", ACTS)
def test_a_terminal_has_a_bar_and_no_lines(act, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="scoresde")
    with redirect_stderr(Terminal()) as terminal:
        act(True, tmp_path / "out")
    assert "\r" in terminal.getvalue()
    assert caplog.records == []


@pytest.mark.parametrize("act", ACTS)
def test_nothing_is_shown_where_nothing_is_asked_for(act, lines, tmp_path):
    with redirect_stderr(Terminal()) as terminal:
        act(False, tmp_path / "out")
    assert terminal.getvalue() == ""
    assert lines() == []


@pytest.mark.parametrize("start", [0, 3, 10])
def test_lines_are_few_whatever_the_length(start, lines):
    for total in (1, 3, 7, 1000):
        bar = Progress(total, "counting", "thing", start=min(start, total))
        for _ in range(min(start, total), total):
            bar.update()
        bar.close()
    found = lines()
    assert len(found) <= 1 + 3 + 5 + 5
    assert found[-1] == "counting: 1000 of 1000 things"


def test_bytes_are_counted_in_millions(lines):
    with Progress(2_000_000, "downloading x", "B", scale=True) as bar:
        bar.update(1_500_000)
    assert lines() == ["downloading x: 1.50M of 2.00MB"]


def test_no_other_module_draws_a_bar():
    users = {path.name for path in ROOT.rglob("*.py") if "tqdm" in path.read_text("utf-8")}
    assert users == {"progress.py"}
