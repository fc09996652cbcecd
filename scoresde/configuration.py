"""Interpretation of a configuration: checks of its values, and objects built from it."""

import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf

from scoresde.errors import InputError, check_count
from scoresde.recipe import build, complete

GROUPS = (
    *(
        "data",
        "sde",
        "model",
        "network",
        "parametrisation",
        "noise_label",
        "loss",
        "optimizer",
        "train",
    ),
    *("likelihood", "sampler", "dequantisation", "distributed"),
)
# Sections that a task on a checkpoint takes from the configuration; the checkpoint has the rest.
USED = {
    "sample": ("sampler", "guidance"),
    "interpolate": ("sampler", "guidance"),
    "restore": ("sampler", "guidance", "data"),
    "encode": ("sampler", "data"),
    "likelihood": ("data", "likelihood", "dequantisation"),
    "classify": ("data", "likelihood"),
    "import": ("data", "likelihood"),
    "ema": ("data", "likelihood"),
    "reflow": ("sampler", "train", "optimizer"),
    "design": ("data",),
}


# The default of each value, and the tasks that use it.
_EVERY = ("sample", "restore", "likelihood", "classify", "encode", "interpolate", "ema")
_SAMPLING = ("sample", "restore", "interpolate")
SERVES = {
    "checkpoint": (None, (*_EVERY, "reflow", "import")),
    "split": ("test", ("train", "search", "restore", "likelihood", "classify", "encode", "ema")),
    "ood": (None, ("likelihood",)),
    "reference": (None, ("import",)),
    "guidance": (None, _SAMPLING),
    "latents": (None, ("sample", "interpolate")),
    "label": (None, (*_SAMPLING, "reflow")),
    "codec": (None, ("train", "search", "benchmark")),
    "images": (False, ("sample", "restore")),
    "conditions": (None, (*_SAMPLING, "reflow")),
    "operator": (None, ("restore",)),
    "source": (None, ("restore",)),
    "steps": (None, ("restore", "train")),
    "noise": (1.0, ("restore", "train")),
    "truth": (None, ("restore",)),
    "trajectory": (None, ("sample",)),
    "compare": (None, ("sample",)),
    "lengths": (None, ("ema",)),
    "prior": (None, ("classify",)),
    "draws": (1, ("likelihood", "restore")),
    "weighted": (False, ("likelihood",)),
    "precision": ("float32", _EVERY),
    "compile": (False, _EVERY),
    "channels_last": (True, _EVERY),
}

# Values that every task reads, besides those of groups.
_REQUIRED = (
    *("task", "seed", "device", "progress", "count", "examples", "batch_size", "draws", "points"),
    *("split", "inspect", "benchmark", "search", "checkpoint"),
    *("threads", "weights", "allow", "baselines", "resident"),
    *(name for name, (plain, _) in SERVES.items() if plain is not None),  # Hydra keeps null
)
_NAMED = ("samplers.", "trackers.")  # sections of any number of named objects
_STEPS = 1000  # of the chain that discretises a continuous process


def run_name(*, _parent_: DictConfig) -> str:
    """Returns the default name of a run: its data and its SDE, or its checkpoint's name.

    Data in a file or a folder are named after it, other data after the function that makes them.
    This function is the resolver ``${run_name:}``.
    """
    checkpoint = _parent_.get("checkpoint")
    if isinstance(checkpoint, str):
        return _name_of(Path(checkpoint).expanduser())
    path, made_by = (_value(_parent_, f"data.{key}") for key in ("path", "_target_"))
    label = _stem(Path(path).expanduser()) if path else made_by.rpartition(".")[2]
    kind = _value(_parent_, "sde._target_").rpartition(".")[2].removesuffix("SDE")
    process = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", kind).lower()
    return "_".join(filter(None, (_for_folder(label), process))) or "run"


def _name_of(checkpoint: Path) -> str:
    """Returns the name of the run that a checkpoint belongs to, without reading its weights."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        return str(OmegaConf.load(folder / ".hydra/config.yaml").name)
    except Exception:  # a damaged file must not prevent a name
        return _for_folder(_stem(checkpoint)) or "run"


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _for_folder(name: str) -> str:
    """Returns a name that is a valid folder name on any system."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")


def _value(config: DictConfig, key: str) -> str:
    """Returns a value as text; empty if it is missing."""
    value = OmegaConf.select(config, key, throw_on_missing=False)
    return "" if value is None else str(value)


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def check(config: DictConfig) -> None:
    """Checks the plain values before anything is built.

    Raises:
        InputError: If a value has the wrong type or range, or would have no effect.
    """
    missing = [name for name in (*GROUPS, *_REQUIRED) if name not in config]
    if missing:
        raise InputError(
            f"{missing[0]} must not be removed from the configuration; remove ~{missing[0]}."
        )
    optional = ("threads", "examples", "trajectory")
    numbers = [name for name in optional if config[name] is not None]
    for name in ("inspect", "benchmark", "search"):
        if config[name] is None:
            raise InputError(f"{name} must not be null; remove {name}=null.")
    for name in ("count", "batch_size", "draws", "points", *numbers):
        value, least = config[name], 2 if name in ("points", "trajectory") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least == 1 else "an integer of at least 2"
            raise InputError(f"{name} must be {kind}, got {value}.")
        check_count(name, value)
    for name in ("count", "examples"):
        check_count(f"inspect.{name}", config.inspect[name])
    whole = isinstance(config.seed, int) and not isinstance(config.seed, bool)
    if not whole or not 0 <= config.seed < 2**63:
        raise InputError(f"seed must be an integer in [0, 2^63), got {config.seed}.")
    for name in ("progress", "baselines", "resident", "weighted", "images", "channels_last"):
        if not isinstance(config[name], bool):
            raise InputError(f"{name} must be true or false, got {config[name]}.")
    for name, (plain, tasks) in SERVES.items():
        if config.get(name) != plain and config.task not in tasks:
            raise InputError(
                f"task={config.task} has no option {name}; remove it, or set task={tasks[0]}."
            )
    texts = ("checkpoint", "latents", "source", "truth", "compare", "reference")
    for name in ("name", "device", "split", *(n for n in texts if config[n] is not None)):
        mapping = name == "reference" and isinstance(config[name], DictConfig)
        if not isinstance(config[name], str) and not mapping:
            raise InputError(f"{name} must be a string, got {config[name]}.")
    if not isinstance(config.allow, str | ListConfig):
        raise InputError(
            f"allow must be a list of package names, got {config.allow}; use allow=[NAME]."
        )
    if config.task in USED:
        idle = [g for g in (*GROUPS, "samplers") if g not in USED[config.task] and given(g)]
        if idle:
            why = (
                "which uses only data"
                if config.task == "design"
                else "whose checkpoint contains its own"
            )
            raise InputError(f"{idle[0]} has no effect on task={config.task}, {why}; remove it.")


def given(section: str) -> list[str]:
    """Returns the overrides of a section of the configuration on the command line."""
    texts = [text.lstrip("+~") for text in HydraConfig.get().overrides.task]
    return [text for text in texts if text.startswith((f"{section}=", f"{section}."))]


def chosen(group: str) -> str:
    """Returns the chosen option of a configuration group."""
    return str(HydraConfig.get().runtime.choices[group])


def measured(plan: Any, data: Any) -> Any:
    """Fills in values that depend on the data, anywhere in a plan.

    They are ``shape: null``, ``sigma_data: auto``, ``variance: auto`` of a bound, and ``levels:
    auto`` with its range. For real data, such as latents, recipes that need levels become None.
    """
    from scoresde.codec import LatentCodec

    if isinstance(plan, list):
        return [measured(value, data) for value in plan]
    if not isinstance(plan, dict):
        return plan
    plan = {k: v if k == "data" else measured(v, data) for k, v in plan.items()}
    if plan.get("variance") == "auto":
        plan["variance"] = variance_of(plan)
    if plan.get("sigma_data") == "auto":
        plan["sigma_data"] = round(data.sigma_data, 4)
    if "shape" in plan and plan["shape"] is None:
        plan["shape"] = list(data.shape)
    real = data.levels is None or isinstance(data.codec, LatentCodec)
    if plan.get("levels") == "auto" and real:
        return None
    if "levels" in plan and "auto" in (plan["levels"], plan.get("low"), plan.get("high")):
        return {**plan, **levels_of(plan, data)}
    return plan


def levels_of(plan: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Returns the number of levels of integers, and their range if the plan requires it."""
    ends = dict(zip(("low", "high"), data.codec.range, strict=True))
    auto = {"levels": data.levels, **ends}
    return {key: value for key, value in auto.items() if plan.get(key) == "auto"}


def variance_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variance for a bound: the lower one for levels, otherwise the upper one.

    The first state determines levels, but not real data (:mod:`scoresde.likelihood.discrete`).
    """
    kind = "ForwardVariance" if plan.get("decoder") is None else "PosteriorVariance"
    return {"_target_": f"scoresde.likelihood.{kind}"}


def cut_of(plan: Any, sde: Any) -> Any:
    """Fills in the number of steps of a bound, if missing, for a continuous process."""
    from scoresde.sde import Chain

    open_ = isinstance(plan, Mapping) and plan.get("steps", 0) is None
    return {**plan, "steps": _STEPS} if open_ and not isinstance(sde, Chain) else plan


def describe(plan: dict[str, Any], data: Any) -> dict[str, Any]:
    """Returns the recipe of a run: plain values from which a checkpoint can be rebuilt."""
    # A classifier, for example, has no parametrisation.
    known = inspect.signature(hydra.utils.get_class(plan["model"]["_target_"])).parameters
    parts = [k for k in ("network", "sde", "parametrisation", "noise_label") if k in known]
    process = {"process": plan["sde"]} if "process" in known else {}
    kept = ("name", "data", "loss", "optimizer", "train", "likelihood", "samplers")
    return {
        "model": {**plan["model"], **{key: plan[key] for key in parts}, **process},
        "units": data.codec.describe(),
        **{key: plan.get(key) for key in kept},
    }


def instantiate(section: Any, name: str) -> Any:
    """Builds the object described by a section.

    Raises:
        InputError: If the section is empty, or a value in it is missing.
    """
    if section is None:
        optional = name.startswith(_NAMED)
        remedy = f"set it, or remove it with ~{name}" if optional else "set it"
        raise InputError(f"{name} must not be null; {remedy}.")
    try:
        return hydra.utils.instantiate(section, _convert_="all")
    except MissingMandatoryValue as error:  # its key omits the section
        key = str(error.full_key)
        key = key if key.startswith(f"{name}.") else f"{name}.{key}"
        part = key.removeprefix(f"{name}.")
        parts = ("sde.", "network.", "parametrisation.", "noise_label.")  # groups of their own
        key = part if name == "model" and part.startswith(parts) else key
        raise InputError(f"{key} is required; set {key}=VALUE.") from error


def build_data(section: Any) -> Any:
    """Builds a data set.

    Raises:
        InputError: If the section does not build a data set.
    """
    from scoresde.data import Dataset

    data = instantiate(section, "data")
    if not isinstance(data, Dataset):
        raise InputError(
            f"data._target_ must return a scoresde.data.Dataset, got {type(data).__name__}; build "
            "one with Dataset.of."
        )
    return data


def with_codec(data: Any, config: DictConfig) -> Any:
    """Returns a data set encoded by the requested autoencoder, or unchanged.

    Raises:
        InputError: If ``codec`` is not a run of an autoencoder, or a folder of diffusers.
    """
    from scoresde.codec import NeuralCodec
    from scoresde.train import load as load_run

    if config.codec is None:
        return data
    if not isinstance(config.codec, str) or not config.codec:
        raise InputError(
            f"codec must be the run folder of an autoencoder, got {config.codec!r}; use "
            "codec=RUN, such as a run of +experiment=digits_vae."
        )
    if not Path(config.codec).expanduser().exists():
        raise InputError(
            f"codec must be an existing run folder, got {config.codec}; if the run was moved, set "
            "codec to its new folder."
        )
    run = load_run(config.codec, allow=allowed(config))
    if not isinstance(run.model, NeuralCodec):
        raise InputError(
            f"codec must be the run folder of an autoencoder, got {config.codec} with a "
            f"{type(run.model).__name__}; train one, such as +experiment=digits_vae."
        )
    if (data.raw_shape, data.levels) != (tuple(run.codec.raw_shape), run.codec.levels):
        raise InputError(
            f"codec must be for data of shape {data.raw_shape} and levels={data.levels}, got one "
            f"for {tuple(run.codec.raw_shape)} and levels={run.codec.levels}; train one on these "
            "data."
        )
    return data.with_codec(run.codec).with_codec(run.model)


def random_data(shape: Sequence[int]) -> Any:
    """Returns images of random bytes, for measurements that do not depend on their content."""
    from scoresde.data import Dataset

    values = torch.randint(0, 256, (512, *shape), dtype=torch.uint8)
    return Dataset.of("random bytes", [values] * 3, levels=256)


def load(config: DictConfig) -> tuple[Any, Any]:
    """Reads the checkpoint and rebuilds its model."""
    from scoresde.train import Checkpoint

    if config.checkpoint is None:
        raise InputError(f"task={config.task} requires checkpoint=RUN_FOLDER_OR_FILE.")
    weights = config.weights
    if isinstance(weights, float):
        checkpoint = stored_averages(config).average(weights)
    elif weights == "best":
        checkpoint = Checkpoint.load_best(config.checkpoint)
    elif weights in ("average", "raw"):
        checkpoint = Checkpoint.load(config.checkpoint)
    else:
        raise InputError(
            f"weights must be average, raw, best, or the length of an average such as 0.1 (for a "
            f"run with train.snapshots), got {weights}."
        )
    model = checkpoint.build_model(allowed(config), average=weights != "raw")
    _check_start(model, config)
    return checkpoint, _prepared(model, config)


def _check_start(model: Any, config: DictConfig) -> None:
    """Raises for a bridge model if the task supplies the start, noise or data."""
    from scoresde.model import BridgeModel

    if isinstance(model, BridgeModel) and config.task != "restore":
        raise InputError(
            f"checkpoint must be of a model that starts from noise for task={config.task}, got "
            f"the bridge {config.checkpoint}, which starts from a source; use task=restore "
            f"checkpoint={config.checkpoint}, optionally with source=PATH."
        )


def _prepared(model: Any, config: DictConfig) -> Any:
    """Returns a model on its device, in the requested precision, compiled if requested."""
    from scoresde.model import BridgeModel, Classifier, ScoreModel
    from scoresde.nn.speed import accelerated

    device = device_of(config.device)
    model = place(model, device) if config.channels_last else model.to(device)
    learned = isinstance(model, ScoreModel | Classifier | BridgeModel)
    if learned and isinstance(model.network, torch.nn.Module):
        mode = {True: "default", False: None}.get(config.compile, config.compile)
        model.network = accelerated(model.network, config.precision, mode)
    elif config.precision != "float32" or config.compile:
        raise InputError(
            "precision and compile must be float32 and false for a checkpoint without a network, "
            f"got {config.precision} and {config.compile}; remove them."
        )
    return model


def stored_averages(config: DictConfig) -> Any:
    """Returns the averages stored by the training run in ``checkpoint``."""
    from scoresde.train import Snapshots

    path = Path(config.checkpoint)
    return Snapshots.of(path if path.is_dir() else path.parent)


def guidance_of(config: DictConfig) -> list[dict[str, Any]]:
    """Returns the recipes of the requested guidance, in the order in which it is applied.

    An option of the group stores its recipe under ``stages``. Several options, as in
    ``guidance=[cfg,clip]``, therefore share their values by name and keep their order.
    """
    section = config.get("guidance")
    values: Any = {} if section is None else OmegaConf.to_container(section, resolve=True)
    stages = {"own": values} if "_target_" in values else values.get("stages", {})
    return list(stages.values())


def guided(model: Any, config: DictConfig, codec: Any) -> tuple[Any, Any]:
    """Returns a model with the requested guidance, and the identity of that guidance.

    Models needed by a guidance are read from their checkpoints and identified by their weights.
    Clipping to the range of the data is identified as such.
    """
    told = []
    for recipe in guidance_of(config):
        others = {key: _other(key, recipe[key], config) for key in _OTHERS if key in recipe}
        told.append({**recipe, **{key: _print(other) for key, other in others.items()}})
        plan = {key: value for key, value in recipe.items() if key not in others}
        for i, name in enumerate(("low", "high")):
            if plan.get(name, 0) is None:
                plan[name] = codec.range[i]
        guidance = instantiate(plan, "guidance")
        if not callable(guidance):
            raise InputError(
                f"guidance must be a callable from model to model, got {type(guidance).__name__}."
            )
        model = guidance(model, **others)
    return model, (told[0] if len(told) == 1 else told or None)


# Options of a guidance that are other models, and their values other than a run.
_OTHERS = {
    "weak": ", or the length of an average such as 0.02 (for a run with train.snapshots)",
    "classifier": "",
}


def _other(key: str, value: Any, config: DictConfig) -> Any:
    """Returns the other model needed by a guidance, with averaged weights."""
    from scoresde.train import Checkpoint

    if key == "weak" and isinstance(value, float):
        checkpoint = stored_averages(config).average(value)
    elif isinstance(value, str):
        checkpoint = Checkpoint.load(value)
    else:
        raise InputError(
            f"guidance.{key} must be a run folder or a checkpoint{_OTHERS[key]}, got {value}; use "
            f"guidance.{key}=RUN."
        )
    return _prepared(checkpoint.build_model(allowed(config)), config)


def _print(model: Any) -> str:
    from scoresde.tasks.identity import fingerprint

    return fingerprint(*(part for pair in sorted(model.state_dict().items()) for part in pair))


def requested(config: DictConfig, model: Any) -> dict[str, torch.Tensor]:
    """Returns the requested conditions of samples, used in turn: classes and those of a file."""
    from scoresde.tasks.sources import read_conditions

    labels = labels_of(config, model)
    if config.conditions is None:
        return labels
    if not isinstance(config.conditions, str):
        raise InputError(f"conditions must be a .npz file, got {config.conditions}.")
    return {**read_conditions(config.conditions, model), **labels}


def labels_of(config: DictConfig, model: Any) -> dict[str, torch.Tensor]:
    """Returns the requested classes as a condition; an empty mapping if there are none."""
    from scoresde.data import check_classes
    from scoresde.model import ScoreModel
    from scoresde.nn.embedding import learned_none

    if config.label is None:
        return {}
    labels = list(config.label) if isinstance(config.label, ListConfig) else [config.label]
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= -1 for c in labels)
    if not labels or not whole:
        raise InputError(
            "label must be an integer class from 0, -1 for none, or a list of these, got "
            f"{config.label}; the noise_label of a network is set when it is trained."
        )
    if not model.takes("label"):
        raise InputError(
            "label must be null for a model trained without classes (network.classes), got "
            f"{config.label}; remove it."
        )
    check_classes(model, max(labels))
    if -1 in labels and isinstance(model, ScoreModel) and not learned_none(model.network, "label"):
        raise InputError(
            "label must be a class for a model trained only on labelled examples, got -1; to "
            "support -1, train with train.condition_dropout=0.1."
        )
    return {"label": torch.tensor(labels)}


def log_prior_of(config: DictConfig, classes: int) -> list[float] | None:
    """Returns the log-probabilities of the classes, or None if they are equal."""
    if config.prior is None:
        return None
    shares = list(config.prior) if isinstance(config.prior, ListConfig) else []
    numbers = all(isinstance(p, int | float) and not isinstance(p, bool) for p in shares)
    if len(shares) != classes or not numbers or not min(shares) > 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            f"prior must be {classes} positive class probabilities that sum to 1, got "
            f"{config.prior}; for equal probabilities use prior=null."
        )
    return [math.log(p) for p in shares]


def check_told(model: Any, data: Any, split: str, optional: Sequence[str] = ()) -> None:
    """Checks that the data have the conditions of the networks in a model.

    Arguments:
        model: The model.
        data: The data set.
        split: The split to use.
        optional: Conditions that may be missing.

    Raises:
        InputError: If a condition is missing: the network was not trained without it.
    """
    from scoresde.data import check_conditions

    for sentence in check_conditions(model, data, [split], optional):
        raise InputError(sentence)


def check_given(model: Any, cond: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Checks that the conditions of a model's training are given for its samples.

    A model trained with ``train.condition_dropout`` also supports "none".
    """
    from scoresde.data import required_conditions

    trained = recipe.get("conditions") or required_conditions(model)
    missing = [name for name in trained if name not in cond]
    if not missing or drops_conditions(recipe):
        return
    if "label" in missing:
        raise InputError(
            "label must be set for a model with classes, got null; use label=3, or label=[0,1,2] "
            "for several in turn. If the model was also trained on examples without a label, as "
            "with train.condition_dropout=0.1, label=-1 is supported."
        )
    raise InputError(
        f"conditions must include {missing[0]} for samples of this model, got "
        f"{', '.join(cond) or 'none'}; use conditions=FILE.npz with an array {missing[0]}, whose "
        "rows are used in turn."
    )


def drops_conditions(recipe: Mapping[str, Any]) -> bool:
    """Returns whether a recipe's training dropped conditions."""
    train = recipe.get("train")
    rate = train.get("condition_dropout", 0) if isinstance(train, Mapping) else 0
    return isinstance(rate, int | float) and rate > 0


def allowed(config: DictConfig) -> Sequence[str]:
    """Returns the packages whose classes a checkpoint may name."""
    return [config.allow] if isinstance(config.allow, str) else list(config.allow or [])


def merged(checkpoint: Any, section: str, kind: type, config: DictConfig) -> Any:
    """Builds a section of the checkpoint with the overrides of the command line.

    ``section=NAME`` replaces the whole section; ``section.key=value`` changes only that value.
    """
    if replaced(section):
        return (
            build_data(config.data) if section == "data" else instantiate(config[section], section)
        )
    return _changed(checkpoint, section, config).build(section, kind, allowed(config))


def replaced(section: str) -> bool:
    """Returns whether the command line replaces a whole section of the checkpoint."""
    return any(text.startswith(f"{section}=") for text in given(section))


def changed_section(checkpoint: Any, section: str, config: DictConfig) -> dict[str, Any]:
    """Returns the recipe of a section with the overrides of the command line."""
    if replaced(section):
        return OmegaConf.to_container(config[section], resolve=True)  # type: ignore[return-value]
    return dict(_changed(checkpoint, section, config).recipe[section])


def _changed(checkpoint: Any, section: str, config: DictConfig) -> Any:
    changed = checkpoint
    for text in given(section):
        key = text.partition("=")[0].removeprefix(f"{section}.")
        changed = changed.with_value(section, key, OmegaConf.select(config, f"{section}.{key}"))
    return changed


def undivided(plan: Any, section: str, codec: Any) -> dict[str, Any]:
    """Returns the recipe of undivided data, if their function would divide them.

    Their own mean and width are not used, and integers have the levels of the model.
    """
    whole = {"fractions": None, "standardise": False, "levels": codec.levels}
    said = [text.partition("=")[0].removeprefix(f"{section}.") for text in given(section)]
    if "fractions" not in _parameters(plan) or "fractions" in said:
        return dict(plan)
    free = [key for key in whole if key in _parameters(plan) and key not in said]
    return {**plan, **{key: whole[key] for key in free}}


def _parameters(plan: Mapping[str, Any]) -> Sequence[str]:
    """Returns the optional arguments of a function that reads a user's own files."""
    from scoresde.data import array, folder

    own = {f"scoresde.data.{function.__name__}": function for function in (array, folder)}
    function = own.get(str(plan.get("_target_")))
    return list(inspect.signature(function).parameters) if function else ()


def evaluated_data(checkpoint: Any, config: DictConfig) -> Any:
    """Returns the checkpoint's data, or the given data, with the checkpoint's codec.

    Data other than the training data are evaluated whole, unless a split is given.
    """
    from scoresde.codec import Codec
    from scoresde.data import Dataset

    if "data" not in checkpoint.recipe and not any(
        text.startswith("data=") for text in given("data")
    ):
        raise InputError(
            "data is required for a checkpoint that does not record its data; for example "
            "data=folder data.path=FOLDER."
        )
    codec = checkpoint.build("units", Codec, allowed(config))
    if given("data") and not given("split"):
        plan = changed_section(checkpoint, "data", config)
        if complete(plan) != complete(checkpoint.recipe.get("data")):
            plan = undivided(plan, "data", codec)
        data = build_data(plan) if replaced("data") else build(plan, allowed(config))
    else:
        data = merged(checkpoint, "data", Dataset, config)
    if (data.raw_shape, data.levels) != (tuple(codec.raw_shape), codec.levels):
        raise InputError(
            f"data must have the model's shape {tuple(codec.raw_shape)} and "
            f"levels={codec.levels}, got {data.raw_shape} and levels={data.levels}."
        )
    return replace(data, codec=codec).renamed(checkpoint.recipe.get("class_names", ()))


def place(model: Any, device: torch.device) -> Any:
    """Moves a model to its device, with the memory layout in which convolutions are fastest."""
    from scoresde.nn.speed import channels_last

    return model.to(device, memory_format=channels_last(model))


def device_of(name: str) -> torch.device:
    """Returns a device by name; ``auto`` selects the fastest available device.

    Raises:
        InputError: If the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        # Each process of torchrun uses the next GPU of its machine.
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device must be available on this machine, got {name} "
            f"({str(error).splitlines()[0]}); use device=auto or device=cpu."
        ) from error
    return device


@torch.no_grad()
def try_model(model: Any, data: Any, labels: int = 0) -> None:
    """Evaluates the model on one example, to report a mismatch early and in one sentence."""
    from scoresde.codec import NeuralCodec
    from scoresde.model import Classifier, ScoreFunction
    from scoresde.streams import Streams

    batch = data.batch("test", Streams.of(0, batch=1)).to(model.device)
    x, cond = batch.x, model.select(batch.cond)
    cond |= {"augment": x.new_zeros(1, labels)} if labels else {}
    t = torch.full((1,), 0.5, device=x.device)
    try:
        if isinstance(model, NeuralCodec):
            model.decode(model.encode(x))
        elif isinstance(model, Classifier):
            model(x, t)
        else:
            ask = model.noise if isinstance(model, ScoreFunction) else model.denoise
            ask(x, t, **cond)
    except (RuntimeError, TypeError, IndexError) as error:
        raise InputError(
            f"Cannot evaluate the network on data of shape {tuple(data.shape)}: "
            f"{' '.join(str(error).split())}; choose another network, or set its shape."
        ) from error
