"""Measures what each option of the training is worth, in one run: medians and ratios.

    python experiments/training_speed.py [+experiment=NAME] [key=value ...] [out=FILE.json]

Every variant takes the same steps on the same random images, in turns, so that a busy machine
slows all of them alike. The first variant has every option on; each of the others lacks one.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from scoresde import ScoreModel
from scoresde.configuration import measured
from scoresde.data import Dataset
from scoresde.train import EMA
from scoresde.train.loop import Training

CONF = Path(__file__).resolve().parent.parent / "conf"
ROUNDS, WARM = 10, 3
VARIANTS = {
    "all": {},
    "float32": {"bf16": False},
    "not compiled": {"compile": False},
    "contiguous": {"layout": torch.contiguous_format},
    "unfused Adam": {"fused": False},
}


def main() -> None:
    given = [a for a in sys.argv[1:] if not a.startswith("out=")]
    out = next((a.removeprefix("out=") for a in sys.argv[1:] if a.startswith("out=")), None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", given or ["+experiment=cifar_vp"])
    if config.threads:
        torch.set_num_threads(config.threads)
    runs = {name: Run(config, device, **options) for name, options in VARIANTS.items()}
    for run in runs.values():
        for _ in range(WARM):
            run.step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run.step())
    medians = {name: statistics.median(values) for name, values in times.items()}
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "overrides": given,
        "batch_size": config.train.batch_size,
        "images_per_second": config.train.batch_size / medians["all"],
        "seconds_per_step": medians,
        "times_slower_without": {name: t / medians["all"] for name, t in medians.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n")


class Run:
    """One variant: a model with its optimiser, and a batch that is always the same."""

    def __init__(self, config, device, bf16=True, compile=True, layout=None, fused=True):
        torch.manual_seed(0)
        layout = layout or torch.channels_last
        size = config.data.get("size") or (28 if "mnist" in config.data._target_ else 32)
        channels = 1 if "mnist" in config.data._target_ else 3
        images = torch.randint(0, 256, (4, channels, size, size), dtype=torch.uint8)
        data = Dataset.of("random", [images] * 3, levels=256)
        plan = measured(OmegaConf.to_container(config, resolve=True), data)
        parts = (plan["network"], plan["sde"], plan["parametrisation"], plan["label"])
        model = ScoreModel(*(instantiate(part, _convert_="all") for part in parts))
        self.model = model.to(device, memory_format=layout).train()
        self.loss = instantiate(plan["loss"], _convert_="all")
        self.ema = EMA(self.model)
        self.training = Training(bf16=bf16, compile=compile)
        self.training.prepare(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-4, fused=fused)
        shape = (plan["train"]["batch_size"], channels, size, size)
        self.x = torch.rand(shape, device=device).to(memory_format=layout)

    def step(self) -> float:
        synchronise(self.x.device)
        clock = time.perf_counter()
        with self.training.autocast(self.x.device):
            value = self.loss(self.model, self.x, seed=0).mean()
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update()
        synchronise(self.x.device)
        return time.perf_counter() - clock


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
