"""The benchmark tells what is so: memory, the data's share, the loop's part, and ratios."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from scoresde import VPSDE, DenoisingScoreMatching, ScoreModel
from scoresde.configuration import random_data
from scoresde.nn import MLP
from scoresde.sample import DDIM
from scoresde.tasks import benchmark
from scoresde.train import Training

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells memory")


def bench(width: int = 64) -> benchmark.Bench:
    torch.manual_seed(0)
    model = ScoreModel(MLP((3, 8, 8), width=width, depth=2), VPSDE())
    return benchmark.Bench(
        model,
        random_data((3, 8, 8)),
        DenoisingScoreMatching(),
        Training(steps=1),
        lambda fused: partial(torch.optim.Adam, lr=1e-3, fused=fused),
        rounds=3,
    )


@linux
def test_the_peak_of_memory_is_that_of_what_was_done():
    little = benchmark._peak(CPU, lambda: torch.zeros(10))
    much = benchmark._peak(CPU, lambda: torch.ones(2**27))  # half a GiB
    assert much - little == pytest.approx(0.5, abs=0.05)
    assert benchmark._peak(CPU, lambda: torch.zeros(10)) == pytest.approx(little, abs=0.05)


def test_variants_are_compared_with_the_first():
    variants = (benchmark.EAGER, benchmark.LAID_OUT)
    first, second = benchmark.training_steps(bench(), 16, variants)
    assert first["of_eager"] == 1
    assert second["of_eager"] == pytest.approx(second["seconds"] / first["seconds"])
    assert first["examples_per_second"] == pytest.approx(16 / first["seconds"])
    assert 0 < first["share_of_peak"] < 1


def test_the_operations_are_those_of_the_products():
    one = bench(width=128)
    weights = sum(p.numel() for p in one.model.parameters() if p.ndim == 2)
    # A forward and two backward products of two operations each for every weight; the first
    # layer's input needs no gradient.
    counted = benchmark._operations(one, 4)
    assert counted == pytest.approx(6 * weights * 4, rel=0.2)


def test_what_the_data_take_is_seen(monkeypatch):
    one, make = bench(), benchmark.batches

    def slow(*arguments, **options):
        for batch in make(*arguments, **options):
            time.sleep(0.05)
            yield batch

    quick = benchmark.loop_overhead(one, 16, benchmark.EAGER)
    monkeypatch.setattr(benchmark, "batches", slow)
    slowed = benchmark.loop_overhead(one, 16, benchmark.EAGER)
    assert slowed["loop_seconds"] - quick["loop_seconds"] > 0.04
    assert slowed["data"] > 0.5
    assert slowed["overhead"] > quick["overhead"]


def test_without_a_compiler_nothing_is_called_compiled(monkeypatch):
    monkeypatch.setattr(benchmark, "can_compile", lambda device: False)
    timed = []

    def steps(bench, size, variants):
        timed.extend(variants)
        return [{"batch": size, "variant": v.name, "seconds": 1.0} for v in variants]

    monkeypatch.setattr(benchmark, "training_steps", steps)
    benchmark.measure(replace(bench(), rounds=1), [4], DDIM(steps=3), None)
    assert timed == [benchmark.EAGER, benchmark.LAID_OUT]


def test_the_table_has_all_of_it(tmp_path, monkeypatch):
    one = replace(bench(), rounds=1)
    # To compile takes long.
    monkeypatch.setitem(benchmark.VARIANTS, "cpu", benchmark.VARIANTS["cpu"][:2])
    results = benchmark.measure(one, [4, 8], DDIM(steps=3), None)
    benchmark.save(results, tmp_path)
    text = (tmp_path / benchmark.TABLE).read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in text.splitlines()[4:8]] == [
        "| 4",
        "| 4",
        "| 8",
        "| 8",
    ]
    assert "(3 passes)" in text
    assert (tmp_path / "benchmark.json").exists()
