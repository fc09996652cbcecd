"""Kills a training at random moments, starts it again, and compares it with one left alone.

    python experiments/stress_kill.py [--kills 24] [--out experiments/stress_kill]

The program runs with checkpoints so frequent, and flushed so slowly, that many of the kills fall
into the writing of one. In the end the weights, their average and the optimiser's state must be
those of the training left alone, bit for bit, and its records without doubles or gaps. The exit
code is 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from scoresde.train import Checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[1]
SLOW = """
import os, time
flush = os.fsync
os.fsync = lambda file: (time.sleep(0.05), flush(file))[1]
"""
SIGNALS = [*[signal.SIGKILL] * 6, signal.SIGTERM, signal.SIGINT]


def command(folder: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "scoresde.run", "network=mlp", f"train.steps={steps}"),
        *("train.save_every=7", "train.validate_every=20", "train.log_every=5", "examples=4"),
        *("train.snapshots=5", "count=4", "baselines=false", "likelihood.probes=1"),
        *("samplers.euler_maruyama.steps=2", "samplers.predictor_corrector.steps=2"),
        *("likelihood.rtol=0.1", "likelihood.atol=0.1", "device=cpu", "progress=false"),
        f"hydra.run.dir={folder}",
    ]


def start(folder: Path, steps: int, slow: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(slow), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder, steps),
        env=environment,
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def progress(folder: Path) -> int:
    """The updates in the newest checkpoint that is named, whether or not it is whole."""
    steps = [int(p.stem) for p in (folder / "checkpoints").glob("[0-9]*.pt")]
    return max(steps, default=0)


def kill_once(folder: Path, steps: int, slow: Path, numbers: random.Random) -> dict:
    """Runs until some updates are saved, and kills at a random moment after."""
    before, clock = progress(folder), time.monotonic()
    process = start(folder, steps, slow)
    while progress(folder) <= before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(numbers.random() * 0.6)
    number = numbers.choice(SIGNALS)
    ended = process.poll() is not None
    if not ended:
        process.send_signal(number)
    code = process.wait()
    return {
        "signal": "none" if ended else signal.Signals(number).name,
        "exit_code": code,
        "saved_before": before,
        "saved_after": progress(folder),
        "half_written": len(list((folder / "checkpoints").glob("*.part"))),
        "seconds": round(time.monotonic() - clock, 2),
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differences(one: Path, other: Path) -> list[str]:
    a, b = Checkpoint.load(one), Checkpoint.load(other)
    found = [
        name
        for name in ("model", "ema", "optimizer", "step", "state")
        if not same(getattr(a, name), getattr(b, name))
    ]
    timed = {"steps_per_second", "examples_per_second", "memory_gib"}
    records = [
        [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(p) if "loss" in r]
        for p in (one, other)
    ]
    regular = [[r for r in rs if r["step"] % 5 == 0] for rs in records]
    steps = [r["step"] for r in records[1]]
    if [r["step"] for r in regular[0]] != [r["step"] for r in regular[1]]:
        found.append("gaps in the records")
    if len(set(steps)) != len(steps):
        found.append("doubles in the records")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    numbers, rows = random.Random(arguments.seed), []
    steps = 40 * arguments.kills
    with tempfile.TemporaryDirectory() as place:
        slow = Path(place) / "slow"
        slow.mkdir()
        (slow / "sitecustomize.py").write_text(SLOW)
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        while sum(row["signal"] != "none" for row in rows) < arguments.kills:
            rows.append(kill_once(killed, steps, slow, numbers))
            print(f"{len(rows):3d}", json.dumps(rows[-1]), flush=True)
            if rows[-1]["signal"] == "none":
                break
        for folder in (killed, whole):
            assert start(folder, steps, slow).wait() == 0
        found = differences(whole, killed)
    result = {"steps": steps, "differences": found, "kills": rows}
    print("differences:", ", ".join(found) or "none")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "README.md").write_text(page(result))
    sys.exit(1 if found else 0)


def page(result: dict) -> str:
    rows = [row for row in result["kills"] if row["signal"] != "none"]
    lines = [
        "# Killed and started again",
        "",
        "    python experiments/stress_kill.py --out experiments/stress_kill",
        "",
        f"{len(rows)} signals in a training run of {result['steps']} updates; differences from an "
        f"undisturbed run: {', '.join(result['differences']) or 'none'}.",
        "",
        "| signal | exit code | updates saved before | after | half-written files left |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ("signal", "exit_code", "saved_before", "saved_after", "half_written")
        lines.append(f"| {' | '.join(str(row[c]) for c in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
