"""What is asked of the files in tests/fixtures/old, when they are made and when they are read."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scoresde.codec import Codec
from scoresde.data import Dataset
from scoresde.streams import Streams
from scoresde.train import Checkpoint
from tests.recorded import PASSES

OLD = Path(__file__).parent / "fixtures/old"
# The group of the labels may have another name on a later command line.
NOISE_LABEL = "noise_label"
# Runs that were interrupted, and their tasks.
RESUMED = {
    "unfinished": "train",
    "killed": "train",
    "unfinished_likelihood": "likelihood",
    "unfinished_weighted": "likelihood",
    "unfinished_uniform": "likelihood",
    "unfinished_sample": "sample",
}


# What a default could change is named, since it would make another training of it.
_TRAINING = [
    *("network=mlp", "network.width=8", "network.depth=1", "baselines=false", "seed=0"),
    *("data=two_moons", "data.count=100", "data.noise=0.1", "data.seed=0"),
    *("optimizer=adam", "optimizer.lr=0.02", "parametrisation.sigma_data=auto"),
    *("train.steps=10", "train.batch_size=16", "train.accumulate=1", "train.snapshots=0"),
    *("train.rate._target_=scoresde.train.CosineRate", "train.rate.warmup=2"),
    *("train.ema=0.999", "train.clip=1.0", "train.precision=float32", "train.compile=false"),
    *("train.log_every=2", "train.validate_every=5", "train.keep=1", "train.augment=null"),
    *("loss.eps=1e-4", "loss.reduce_mean=true", "examples=2", "count=2"),
    *("likelihood.rtol=0.1", "likelihood.atol=0.1", "likelihood.probes=1"),
    *("samplers.euler_maruyama.steps=2", "samplers.predictor_corrector.steps=2"),
    *("samplers.probability_flow.rtol=0.1", "samplers.probability_flow.atol=0.1"),
]
_EVALUATION = ["examples=8", "batch_size=2", "split=test", "likelihood.eps=1e-3", "seed=0"]
_COMMANDS = {
    "unfinished": [
        *_TRAINING,
        *("sde=vp", "sde.beta_min=0.1", "sde.beta_max=20.0", "parametrisation=preconditioned"),
        *("loss=edm", "times@loss.times=log_normal", f"{NOISE_LABEL}=noise_level"),
        "+network.embedding={_target_:scoresde.nn.FourierEmbedding,width:4,scale:1.0,log:false}",
        *("network.dropout=0.0", "train.save_every=20"),
    ],
    "killed": [
        *_TRAINING,
        *("sde=subvp", "sde.beta_min=0.1", "sde.beta_max=20.0", "parametrisation=noise"),
        *("loss=likelihood", "times@loss.times=importance", f"{NOISE_LABEL}=scaled_time"),
        f"{NOISE_LABEL}.scale=999.0",
        "+network.embedding={_target_:scoresde.nn.PositionalEmbedding,width:4}",
        *("network.dropout=0.3", "train.save_every=6"),
    ],
    "unfinished_likelihood": [
        *("task=likelihood", "checkpoint=digits_ve.pt", *_EVALUATION),
        *("likelihood.rtol=1e-3", "likelihood.atol=1e-3", "likelihood.probes=2"),
    ],
    "unfinished_weighted": [
        *("task=likelihood", "checkpoint=digits.pt", *_EVALUATION, "draws=2", "weighted=true"),
        *("dequantisation=truncated_normal", "dequantisation.std=0.3"),
    ],
    "unfinished_uniform": [
        *("task=likelihood", "checkpoint=digits_bound_times.pt", "examples=8", "batch_size=2"),
        *("split=validation", "seed=3", "draws=2", "dequantisation=uniform"),
    ],
    "unfinished_sample": [
        *("task=sample", "checkpoint=edm.pt", "count=7", "batch_size=2", "seed=0"),
        *("sampler=predictor_corrector", "sampler.steps=4", "sampler.eps=1e-3"),
        *("sampler.final_denoise=false", "sampler.temperature=1.0", "sampler.corrector.snr=0.16"),
        *("sampler.corrector.steps=1", "grid@sampler.grid=uniform"),
        *("guidance=clip", "guidance.low=-2.0", "guidance.high=2.0"),
    ],
}


def command(name):
    """Returns the command line of an interrupted run, for the folder of these files."""
    return ["device=cpu", "progress=false", "threads=1", *_COMMANDS[name]]


def table(name, folder):
    """Returns what a finished evaluation or sampling has left."""
    found = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            for key in file.files:
                if key == "seconds":
                    continue
                adaptive = path.stem == "likelihood"
                tolerance = PASSES if key == "nfe" else 1e-3
                kind, end = ("adaptive", f"@{tolerance}") if adaptive else ("exact", "")
                value = file[key].astype(np.int64) if key == "seed" else file[key]
                found[f"{kind}/{name}/{key}{end}"] = torch.from_numpy(np.asarray(value))
    return found


def sections(checkpoint):
    """Builds every section of a recipe; what is no part of a model as a training builds it."""
    from hydra.utils import instantiate

    built = {}
    for name in checkpoint.recipe:
        if name == "name":
            continue
        if name in ("train", "optimizer"):
            built[name] = instantiate(checkpoint.recipe[name], _convert_="all")
        elif name == "model":
            built[name] = checkpoint.build_model()
        else:
            built[name] = checkpoint.build(name, object)
    return built


def applied(path):
    """Returns the numbers that a checkpoint gives, by their names."""
    name, found = path.stem, {}
    checkpoint = Checkpoint.load(path)
    with contextlib.chdir(path.parent):
        built = sections(checkpoint)
        data = checkpoint.build("data", Dataset)
    # A table is standardised by columns since; the checkpoint keeps the map that it was made with.
    units = checkpoint.build("units", Codec)
    data = replace(data, codec=units)
    streams = Streams.of(seed=1, seeds=range(3))
    for split in ("train", "test"):
        found[f"exact/{name}/data/{split}"] = data.batch(split, streams).x.flatten(1)[:, ::7]
    raw = checkpoint.build_model(average=False).double()
    # Rounding in float64 is far below what is allowed, on any machine.
    model, x = checkpoint.build_model().double(), data.batch("test", streams).x.double()
    t = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        for part in ("noise", "denoise", "score"):
            found[f"exact/{name}/{part}"] = getattr(model, part)(x, t).flatten(1)[:, ::7]
        found[f"exact/{name}/raw/noise"] = raw.noise(x, t).flatten(1)[:, ::7]
        found[f"exact/{name}/single"] = model.float().noise(x.float(), t).flatten(1)[:, ::7]
        model = model.double()
        found[f"exact/{name}/loss"] = built["loss"](model, x, seed=2)
    for key, sampler in (built["samplers"] or {}).items():
        plan = checkpoint.recipe["samplers"][key]
        adaptive = plan.get("adaptive", "rtol" in plan)
        kind, end = ("adaptive", f"@{plan['rtol']}") if adaptive else ("exact", "")
        samples = sampler(model, (2, *units.shape), seed=3)
        found[f"{kind}/{name}/samplers/{key}/x{end}"] = samples.x.flatten(1)[:, ::7]
        end = f"@{PASSES}" if adaptive else ""
        found[f"{kind}/{name}/samplers/{key}/nfe{end}"] = samples.nfe
        if samples.log_prob is not None:
            found[f"adaptive/{name}/samplers/{key}/log_prob@{plan['rtol']}"] = samples.log_prob
    plan = checkpoint.recipe["likelihood"]
    result = built["likelihood"](model, x, seed=4)
    kind, end = ("adaptive", f"@{plan['rtol']}") if "rtol" in plan else ("exact", "")
    for part in ("log_prob", "standard_error"):
        found[f"{kind}/{name}/likelihood/{part}{end}"] = getattr(result, part)
    found[f"{kind}/{name}/likelihood/nfe{f'@{PASSES}' if end else ''}"] = result.nfe
    training, make = built["train"], built["optimizer"]
    rates = [training.rate(step, training.steps) for step in range(training.steps)]
    found[f"exact/{name}/rates"] = torch.tensor(rates, dtype=torch.float64)
    make(model.parameters()).load_state_dict(checkpoint.optimizer)
    found[f"exact/{name}/step"] = torch.tensor([checkpoint.step, checkpoint.seed])
    text = json.dumps(checkpoint.recipe, sort_keys=True)
    assert "/tmp" not in text, "a path of one machine"
    return {key: value.detach() for key, value in found.items()}
