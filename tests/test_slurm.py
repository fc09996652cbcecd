"""The batch script for Slurm, with a queue that only writes down what it is asked for."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs/guide/slurm.sbatch"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [ "$1" = show ]; then echo node7; echo node8; fi
"""
# The program under srun: leaves with a code, after it has written a status.
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
if [ -n "$STATUS" ]; then echo "{\\"status\\": \\"$STATUS\\"}" > "$RUN/result.json"; fi
exit $CODE
"""
# One that ends by SIGTERM, as the program does.
WAITING = """#!/bin/bash
trap 'exit 75' TERM
echo "srun $*" >> "$CALLS"
for i in $(seq 200); do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Runs the script as a job, and returns its exit code and the calls."""
    bin_, calls = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    calls.touch()

    def start(srun=SRUN, code=0, status="", **slurm):
        for name, text in (("scontrol", SCONTROL), ("srun", srun)):
            (bin_ / name).write_text(text)
            (bin_ / name).chmod(0o755)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            **{"CALLS": str(calls), "CODE": str(code), "STATUS": status},
            **{"RUN": str(tmp_path / "run"), "SLURM_JOB_ID": "12345"},
            **{f"SLURM_{key}": value for key, value in slurm.items()},
        }
        command = ["bash", str(SCRIPT), "+experiment=cifar_vp", "name=two words"]
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)

    def finish(*arguments, **options):
        process = start(*arguments, **options)
        _, said = process.communicate(timeout=60)
        return process.returncode, calls.read_text().splitlines(), said.decode()

    finish.start, finish.calls = start, calls
    return finish


def test_a_job_that_is_done_is_not_queued_again(job, tmp_path):
    code, calls, _ = job(status="ok")
    run = tmp_path / "run"
    assert code == 0
    assert calls == [
        "srun python -m scoresde.run +experiment=cifar_vp name=two words " + f"hydra.run.dir={run}"
    ]


def test_a_stopped_training_is_queued_again(job):
    code, calls, _ = job(code=75, status="stopped")
    assert code == 0
    assert calls[1:] == ["scontrol requeue 12345"]


@pytest.mark.parametrize("failed", [1, 2, 130, 137])
def test_an_error_ends_the_job_with_its_code(failed, job):
    code, calls, _ = job(code=failed, status="failed")
    assert code == failed
    assert len(calls) == 1


def test_several_nodes_meet_at_the_first(job):
    _, calls, _ = job(NNODES="2", GPUS_ON_NODE="8", JOB_NODELIST="node[7-8]")
    assert calls[0] == "scontrol show hostnames node[7-8]"
    words = calls[1].split()
    assert words[:4] == ["srun", "--ntasks=2", "--ntasks-per-node=1", "torchrun"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=12345"} <= {*words}
    assert "--rdzv-endpoint=node7:32345" in words
    assert words[words.index("-m") + 1] == "scoresde.run"


def test_torchrun_hides_the_code_but_the_folder_tells(job):
    code, calls, _ = job(code=1, status="stopped", NNODES="2", JOB_NODELIST="x")
    assert (code, calls[-1]) == (0, "scontrol requeue 12345")


def test_what_an_earlier_start_left_is_no_reason_to_queue_again(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text('{"status": "stopped"}')
    os.utime(tmp_path / "run/result.json", (1, 1))
    code, calls, _ = job(code=1)
    assert code == 1
    assert len(calls) == 1


def test_it_gives_up_after_a_hundred_times(job):
    code, calls, said = job(code=75, status="stopped", RESTART_COUNT="100")
    assert code == 75
    assert len(calls) == 1
    assert "go on by: RUN=" in said


def test_a_signal_to_the_whole_job_waits_for_the_program(job):
    """Pre-emption signals the shell of the script too."""
    process = job.start(WAITING)
    deadline = time.monotonic() + 30
    while not job.calls.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    process.send_signal(signal.SIGTERM)
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert job.calls.read_text().splitlines()[-1] == "scontrol requeue 12345"
