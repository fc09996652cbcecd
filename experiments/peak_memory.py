"""Measures the memory that a training on a large raw array takes.

Writes random images (uint8, 3 x 64 x 64) into a temporary folder, trains on them with the
command line, and prints the most anonymous memory (RssAnon: what the system cannot drop) and the
most resident memory (with the pages of the file that happen to be cached):

    python experiments/peak_memory.py [--gib 2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SMALL = (
    *("network.width=8", "network.blocks=1", "train.steps=20", "train.batch_size=16", "count=4"),
    *("examples=4", "batch_size=4", "baselines=false", "progress=false", "device=cpu"),
    *("likelihood.rtol=0.1", "likelihood.atol=0.1", "samplers.predictor_corrector.steps=2"),
    *("samplers.euler_maruyama.steps=2", "samplers.probability_flow.rtol=0.1"),
    "samplers.probability_flow.atol=0.1",
)


def write(path: Path, gib: float) -> int:
    """Writes an array of random images; returns its bytes."""
    generator, count = np.random.default_rng(0), int(gib * 2**30 / (3 * 64 * 64)) + 1
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, 64, 64))
    for i in range(0, count, 4096):
        shape = array[i : i + 4096].shape
        array[i : i + 4096] = generator.integers(0, 256, shape, np.uint8)
    array.flush()
    return int(array.nbytes)


def field(process: int, name: str) -> float:
    """Returns a field of a process's status in MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith(name)]
    return max(found, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        size = write(path, given.gib)
        words = ("data=array", f"data.path={path}", *SMALL, f"hydra.run.dir={folder}/run")
        command = [sys.executable, "-m", "scoresde.run", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        clock, most, resident = time.perf_counter(), 0.0, 0.0
        with subprocess.Popen(command, env=environment) as process:
            while process.poll() is None:
                most = max(most, field(process.pid, "RssAnon"))
                resident = max(resident, field(process.pid, "VmHWM"))
                time.sleep(0.01)
        seconds = time.perf_counter() - clock
    print(
        f"{size / 2**20:.0f} MiB of images: RssAnon at most {most:.0f} MiB, resident at most "
        f"{resident:.0f} MiB, {seconds:.0f} s, exit code {process.returncode}"
    )


if __name__ == "__main__":
    main()
