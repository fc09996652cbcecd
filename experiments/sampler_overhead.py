"""Measures the cost of samplers in addition to the network: bookkeeping, updates, random numbers.

    python experiments/sampler_overhead.py [--experiment cifar_vp] [--batch 4] [--steps 5]
                                           [--rounds 5] [--out FOLDER]

The network is that of a recipe with its first weights. Each sampler is run in turns with as many
bare calls of the network on the same batch. Three figures come of it: the ratio of the two times
(medians over the rounds; on a busy machine no better than the noise of two runs), the share of a
sampler's time that it spends outside of the network, and that of its random numbers alone, both
taken within one run. On a GPU the device is waited for at the ends of a run only for the first
figure, and around every call for the other two.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from scoresde import ScoreModel
from scoresde.model import evaluating
from scoresde.nn.speed import accelerated
from scoresde.sample import (
    DDIM,
    DPMSolverPP,
    EulerMaruyama,
    GottaGoFast,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    Sampler,
    TorchSDE,
)
from scoresde.streams import Streams

CONF = Path(__file__).resolve().parent.parent / "conf"


def samplers(steps: int) -> dict[str, Sampler]:
    """The samplers; the adaptive ones take a short way."""
    return {
        "DDIM": DDIM(steps),
        "DPM-Solver++ 2M": DPMSolverPP(steps, order=2),
        "Heun": Heun(steps),
        "Euler-Maruyama": EulerMaruyama(steps),
        "Euler-Maruyama along a path": EulerMaruyama(steps, along_path=True),
        "predictor-corrector": PredictorCorrector(steps),
        "torchsde's Euler": TorchSDE(steps),
        "probability flow": ProbabilityFlow(0.5, 0.5, eps=0.5),
        "Gotta Go Fast": GottaGoFast(0.5, 0.5, eps=0.95),
    }


class Timed(nn.Module):
    """A network that knows the time spent in it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds, self.calls, self.watched = 0.0, 0, False

    def forward(self, x: Tensor, c: Tensor, **cond: Tensor) -> Tensor:
        self.calls += 1
        if not self.watched:
            return self.network(x, c, **cond)
        wait(x.device)
        clock = time.perf_counter()
        y = self.network(x, c, **cond)
        wait(x.device)
        self.seconds += time.perf_counter() - clock
        return y


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    clock = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - clock


def numbers(device: torch.device) -> tuple[Callable, list[float]]:
    """Random numbers that are timed, to be put in the place of ours, and the times."""
    spent: list[float] = []
    draw = Streams.normal

    def normal(self: Streams, *arguments, **named) -> Tensor:
        clock = time.perf_counter()
        wait(device)
        z = draw(self, *arguments, **named)
        wait(device)
        spent.append(time.perf_counter() - clock)
        return z

    return normal, spent


def measure(model: ScoreModel, timed: Timed, sampler: Sampler, shape, rounds: int) -> dict:
    device = model.device
    x, t = torch.randn(shape, device=device), torch.full((), 0.5, device=device).double()
    latent = sampler.latent(model, shape, seed=0)

    def ours() -> None:
        sampler(model, latent=latent, seed=0)

    timed.calls, timed.watched = 0, False
    ours()
    calls = timed.calls

    @torch.no_grad()
    def bare() -> None:
        c = model.noise_label(model.sde, t).float().to(device).expand(shape[0])
        with evaluating(model, frozen=True):
            for _ in range(calls):
                timed.network(x, c)

    pairs = [(seconds(ours, device), seconds(bare, device)) for _ in range(rounds)]
    draw, spent = numbers(device)
    timed.watched, timed.seconds = True, 0.0
    plain, Streams.normal = Streams.normal, draw
    try:
        total = sum(seconds(ours, device) for _ in range(rounds))
    finally:
        Streams.normal = plain
    return {
        "passes": calls,
        "seconds": statistics.median(a for a, _ in pairs),
        "over bare calls": statistics.median(a / b for a, b in pairs) - 1,
        "outside of the network": (total - timed.seconds) / timed.seconds,
        "random numbers": sum(spent) / timed.seconds,
    }


def page(result: dict) -> str:
    lines = [
        "# Cost of samplers in addition to the network",
        "",
        f"    {result['command']}",
        "",
        f"- hardware: {result['hardware']}; commit {result['commit']}",
        f"- {result['network']}, {result['parameters'] / 1e6:.1f} M parameters, batches of "
        f"{result['batch']}, median of {result['rounds']} rounds",
        "",
        "| sampler | passes | over bare calls | outside of the network | random numbers |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["samplers"].items():
        shares = ("over bare calls", "outside of the network", "random numbers")
        cells = " | ".join(f"{100 * row[key]:.2f} %" for key in shares)
        lines.append(f"| {name} | {row['passes']} | {cells} |")
    lines += ["", "All in parts of the time of the network's passes.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="cifar_vp")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", default=None, help="a mode of torch.compile")
    parser.add_argument("--out", type=Path, default=Path("experiments/sampler_overhead"))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"+experiment={given.experiment}"])
    shape = (3, 32, 32)
    network_ = OmegaConf.to_container(config.network, resolve=True)
    network = instantiate({**network_, "shape": list(shape)}, _convert_="all")
    network = network.to(device, memory_format=torch.channels_last)
    timed = Timed(accelerated(network, given.precision, given.compile))
    parametrisation = OmegaConf.to_container(config.parametrisation, resolve=True)
    if parametrisation.get("sigma_data") == "auto":
        parametrisation["sigma_data"] = 0.5
    model = ScoreModel(
        timed, instantiate(config.sde), instantiate(parametrisation), instantiate(config.label)
    ).eval()
    rows = {}
    for name, sampler in samplers(given.steps).items():
        rows[name] = measure(model, timed, sampler, (given.batch, *shape), given.rounds)
        print(name, rows[name], flush=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, 1 thread"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    options = f"--experiment {given.experiment} --batch {given.batch} --steps {given.steps}"
    result = {
        "command": f"python experiments/sampler_overhead.py {options}",
        "hardware": f"{hardware}, torch {torch.__version__}, {given.precision}",
        "commit": commit,
        "network": given.experiment,
        "parameters": sum(p.numel() for p in network.parameters()),
        "batch": given.batch,
        "rounds": given.rounds,
        "samplers": rows,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    (given.out / "README.md").write_text(page(result))


if __name__ == "__main__":
    main()
