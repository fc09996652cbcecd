"""Records a run as an experiment, and writes the table of all of them.

    python experiments/collect.py RUN_FOLDER ... [--note TEXT]    # record runs, then the table
    python experiments/collect.py                                 # write the table alone

Each experiment is a folder named like its recipe: ``results.json`` (figures, command, hardware,
seed, commit), ``figure.png`` and a ``README.md``. Nothing in them is typed by hand.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml

HERE = Path(__file__).parent
# What is published for the same measurement: nothing for these small sets.
PUBLISHED: dict[str, str] = {}
APART = """

## Other measurements

- the loss of likelihood by the cut-off: [table](likelihood_cutoff/table.md)
  (`likelihood_cutoff.py`)
- trace estimators at equal cost: [figure](probe_variance/figure.png) (`probe_variance.py`)
- the weight and the times of training on seven sets: [tables](training_defaults/README.md)
  (`training_defaults.py`)
- the cost of a likelihood at equal error: [tables](likelihood_speed/README.md)
  (`likelihood_speed.py`)
- every sampler's quality by its cost, and next to its peers: [figures](sampler_quality/README.md)
  (`sampler_quality.py`)
- a diffusion model as a classifier, and what common random numbers save:
  [tables](generative_classifier/README.md) (`task=classify`, `generative_classifier.py`)
- inverse problems: every method on mixtures, next to azula, and on held-out digits:
  [tables](inverse_problems/README.md) (`inverse_problems.py`)
- bridges on held-out digits, next to a Wiener filter and bicubic interpolation:
  [tables](restoration/README.md) (`restoration.py`)
- the cost of a sampler in addition to its network: [table](sampler_overhead/README.md)
  (`sampler_overhead.py`)
- the memory for training on a 2 GiB array: 507 MiB of anonymous memory, 46 s on two
  CPU cores (`peak_memory.py`)
- a training run killed repeatedly, compared with an undisturbed one:
  [table](stress_kill/README.md)
  (`stress_kill.py`)
- training steps, the loop, sampling and checkpoints of the CIFAR-10 network on a CPU:
  [table](benchmark/README.md) (`task=benchmark`)
- the length of the average of the weights, chosen after training:
  [figure](average_lengths/README.md) (`task=ema`)
- the times and the couplings of flow matching, and reflow, on two moons:
  [table](flow_matching/README.md) (`flow_matching.py`, `task=reflow`)
- the benefit and cost of the guidance scale, on the digits:
  [figure](guidance_scale/README.md) (`guidance_scale.py`)
- a diffusion of a VAE's latents against the VAE alone, and what a sample costs:
  [tables](latent_digits/README.md) (`latent_digits.py`)
"""
WAITING = """

## Ready to run on a GPU

There are no results from a GPU yet, since none was available. These commands need a GPU.

```sh
# the effect of each training option, the loop's overhead and sampling, in one run
python -m scoresde.run task=benchmark +experiment=cifar_vp benchmark.shape=[3,32,32] \\
    benchmark.batch_sizes=[128,256]
# DDPM++ for 50,000 updates, 64 images by three samplers, bits/dim (published: 3.16)
python -m scoresde.run +experiment=cifar_vp data.root=FOLDER train.steps=50000 examples=1000
# the same with the sub-VP SDE (published: 3.02)
python -m scoresde.run +experiment=cifar_subvp data.root=FOLDER train.steps=50000 examples=1000
```
"""


def record(run: Path, note: str) -> None:
    result = json.loads((run / "result.json").read_text())
    if result.pop("status") != "ok":
        sys.exit(f"{run} did not finish; only finished runs are recorded.")
    result.pop("task", None)
    config = yaml.safe_load((run / ".hydra/config.yaml").read_text())
    name = config["name"]
    overrides = [o for o in result.pop("overrides") if not o.startswith(("progress", "hydra."))]
    # Where the data lay is nobody's business, and nobody else's path.
    overrides = ["data.root=FOLDER" if o.startswith("data.root=") else o for o in overrides]
    overrides = ["codec=RUN" if o.startswith("codec=") else o for o in overrides]
    own = ("+experiment", "seed", "data.root", "codec")
    if any(o.partition("=")[0] not in own for o in overrides):
        sys.exit(f"{run} was changed by {overrides}; an experiment is its recipe as it stands.")
    about = {
        "command": " ".join(["python -m scoresde.run", *overrides]),
        "hardware": f"{hardware()}, {config['threads'] or 'all'} thread(s) used",
        "note": note,
        "data": result.pop("data"),
        "seed": config["seed"],
        "commit": commit_of(run),
        "torch": torch.__version__,
    }
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**about, "results": result}, indent=2) + "\n")
    shutil.copy(run / "comparison.png", folder / "figure.png")
    (folder / "README.md").write_text(page(name, about, result))


def page(name: str, about: dict, result: dict) -> str:
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in result.items())
    facts = "\n".join(f"- {key}: `{value}`" for key, value in about.items() if value)
    return (
        f"# {name}\n\n{facts}\n\n![test data next to samples](figure.png)\n\n"
        f"| | |\n|---|---|\n{rows}\n\nTimes are in seconds. Lower bits/dim and nats are better.\n"
    )


def table() -> str:
    lines = [
        "# Experiments",
        "",
        "Generated by `python experiments/collect.py RUN_FOLDER`. One row for each recipe of",
        "`conf/experiment/` that has been run; its folder gives the command, hardware and commit.",
        "",
        "| recipe | published | ours | standard error | best baseline | exact | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(HERE.glob("*/results.json")):
        results = json.loads(path.read_text())["results"]
        unit = "bits/dim" if "bits_per_dim" in results else "nats"
        value = results.get("bits_per_dim", results.get("nats"))
        baselines = [results[k] for k in ("gaussian", "mixture") if k in results]
        baseline = f"{min(baselines):.3f}" if baselines else "–"
        exact = f"{results['exact']:.3f}" if "exact" in results else "unknown"
        name = path.parent.name
        lines.append(
            f"| [{name}]({name}/README.md) | {PUBLISHED.get(name, '–')} | {value:.3f} {unit} "
            f"| {results['standard_error']:.3f} | {baseline} | {exact} "
            f"| {results['seconds_training']:.0f} |"
        )
    return "\n".join(lines) + APART + WAITING


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU with {os.cpu_count()} cores"


def commit_of(run: Path) -> str:
    """The commit that was checked out when the run began, if the checkout was clean."""
    began = int((run / ".hydra/config.yaml").stat().st_mtime)
    commit = git("rev-list", "-1", f"--before={began}", "HEAD")
    return git("rev-parse", "--short", commit)


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--note", default="", help="what else a reader of the times must know")
    given = parser.parse_args()
    for folder in given.runs:
        record(folder, given.note)
    (HERE / "README.md").write_text(table())
