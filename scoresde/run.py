"""The command line: composes a configuration, builds the objects it names, calls a task.

Exit codes: 0 done; 1 the configuration is refused by Hydra, or a job of a sweep failed; 2 the
input cannot be used (one sentence says why); 130 interrupted.
"""

import hashlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from scoresde.errors import InputError, SolverError, check_count
from scoresde.tasks.parts import Parts, Rank
from scoresde.tasks.report import save_result
from scoresde.tasks.summary import format_table, summarise

log = logging.getLogger("scoresde")

# In a checkout that is not installed, conf/ is no package but lies beside ours.
CONF = "pkg://scoresde.conf" if find_spec("scoresde.conf") else "../conf"
INPUT_ERROR, INTERRUPTED = 2, 130
PARTS = "parts"  # where a likelihood keeps the batches that are done
GROUPS = (
    *("data", "sde", "network", "parametrisation", "label", "loss", "optimizer", "train"),
    *("likelihood", "sampler", "dequantisation"),
)
# What a task on a checkpoint uses of the configuration; the rest is the checkpoint's own.
USED = {
    "sample": ("sampler",),
    "likelihood": ("data", "likelihood", "dequantisation"),
    "import": ("data", "likelihood"),
}


def main() -> None:
    """Runs the program on the command line's arguments."""
    # A console script, unlike "python -m", does not look for modules in the current folder.
    sys.path.insert(0, os.getcwd())
    # The other data set is one of the group data, at the place ood.
    sys.argv[1:] = [f"data@{t}" if t.startswith("ood=") else t for t in sys.argv[1:]]
    empty = [text for text in sys.argv[1:] if text in {f"{group}=null" for group in GROUPS}]
    if empty:
        fail(f"{empty[0]} leaves nothing; choose one of its options (see scoresde --help).")
    _main()


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _main(config: DictConfig) -> None:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    result: dict[str, Any] = {"task": config.get("task"), "overrides": overrides}
    rank, before = _rank(), _result(folder)
    save_result(folder, {"status": "running", **result}, rank.index)
    try:
        check(config)
        _check_rank(config, rank)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        result |= {"status": "ok", **_run(config, folder)}
        save_result(folder, result, rank.index)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = explain(error)
        message = sentence or f"{type(error).__name__}: {error}"
        failed = {**result, "status": "failed", "error": message}
        # An evaluation that was finished stays so when it is not gone on with.
        save_result(folder, before if before.get("status") == "ok" else failed, rank.index)
        if not sweeping and sentence is None:
            raise
        if not sweeping:
            fail(message)
        # The other jobs of a sweep go on; this one is a row that says so.
        log.error("Job failed: %s", message)
        if sentence is None:
            log.error(traceback.format_exc())


def fail(message: str) -> None:
    """Prints one sentence and leaves with the code for unusable input."""
    print(f"scoresde: {message}", file=sys.stderr)
    sys.exit(INPUT_ERROR)


def explain(error: BaseException) -> str | None:
    """Returns the sentence for an error of the user's making, or None for one of ours."""
    match error:
        case InputError() | SolverError():
            return str(error)
        case InstantiationException():
            inner = error.__cause__
            if isinstance(inner, InputError):
                return str(inner)
            given = ", ".join(HydraConfig.get().overrides.task) or "nothing"
            return f"{_one_line(error)} Check the values given: {given}."
        case MissingMandatoryValue():
            return f"{error.full_key} has no value; give {error.full_key}=..."
        case OmegaConfBaseException():
            return _one_line(error)
        case torch.OutOfMemoryError():
            return "The device has too little memory; lower train.batch_size or batch_size."
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}; choose another folder or free space."
    return None


def _one_line(error: BaseException) -> str:
    hint = "set env var HYDRA_FULL_ERROR=1 to see chained exception."
    return " ".join(str(error).replace(hint, "").split())


def _rank() -> Rank:
    """Which of the processes that torchrun has started this is."""
    return Rank(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def _check_rank(config: DictConfig, rank: Rank) -> None:
    if rank.size == 1:
        return
    if config.task != "likelihood":
        raise InputError(f"task={config.task} runs in one process; start it without torchrun.")
    if not any(text.startswith("hydra.run.dir=") for text in HydraConfig.get().overrides.hydra):
        raise InputError(f"{rank.size} processes must share a folder; give hydra.run.dir=FOLDER.")


def _result(folder: Path) -> dict[str, Any]:
    """Returns what a run in the folder has left; nothing where there is none, or none to read."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def _refuse_second_run(task: str | None, folder: Path) -> None:
    if not (folder / "result.json").exists():
        return
    # A likelihood goes on where it stopped, if it is the same; its pieces know.
    if task != "likelihood" or _result(folder).get("task") != task:
        fail(f"The folder {folder} holds a run already; choose another by hydra.run.dir=FOLDER.")


# --- Tasks ---------------------------------------------------------------------------------------


def check(config: DictConfig) -> None:
    """Checks the plain values before anything is built.

    Raises:
        InputError: If one is of the wrong type or range, or would have no effect.
    """
    missing = [group for group in GROUPS if group not in config]
    if missing:
        raise InputError(f"{missing[0]} was removed and leaves nothing; leave ~{missing[0]} out.")
    optional = [name for name in ("threads", "examples") if config[name] is not None]
    for name in ("count", "batch_size", "draws", *optional):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{name}={value} is not a positive integer; give at least 1.")
        check_count(name, value)
    if isinstance(config.seed, bool) or not isinstance(config.seed, int) or config.seed < 0:
        raise InputError(f"seed={config.seed} is no integer in [0, 2^63); give a number.")
    if config.seed >= 2**63:
        raise InputError(f"seed={config.seed} is not below 2^63; give a smaller number.")
    for name in ("progress", "baselines", "resident", "weighted"):
        if not isinstance(config[name], bool):
            raise InputError(f"{name}={config[name]} is neither true nor false.")
    if config.get("ood") is not None and config.task != "likelihood":
        raise InputError(f"ood has no effect on task={config.task}; leave it out.")
    if config.reference is not None and config.task != "import":
        raise InputError(f"reference has no effect on task={config.task}; leave it out.")
    for name in ("name", "device", "split", *(["checkpoint"] if config.checkpoint else [])):
        if not isinstance(config[name], str):
            raise InputError(f"{name}={config[name]} is no word; give text.")
    if not isinstance(config.allow, str | ListConfig):
        raise InputError(f"allow={config.allow} is no list of packages; give allow=[NAME].")
    if config.task in USED:
        idle = [g for g in (*GROUPS, "samplers") if g not in USED[config.task] and _given(g)]
        if idle:
            raise InputError(
                f"{idle[0]} has no effect on task={config.task}: the checkpoint holds its own; "
                "leave it out."
            )


def _given(section: str) -> list[str]:
    """Returns what the command line says of a section of the configuration."""
    texts = [text.lstrip("+~") for text in HydraConfig.get().overrides.task]
    return [text for text in texts if text.startswith((f"{section}=", f"{section}."))]


def _run(config: DictConfig, folder: Path) -> dict[str, Any]:
    tasks: dict[str, Callable[[DictConfig, Path], dict[str, Any]]] = {
        "train": train,
        "sample": sample,
        "likelihood": likelihood,
        "import": import_,
    }
    if config.task not in tasks:
        raise InputError(f"task={config.task} is unknown; give one of {', '.join(tasks)}.")
    return tasks[config.task](config, folder)


def train(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a model, samples it, evaluates it, and reports."""
    from scoresde.tasks.report import Trained, report_training
    from scoresde.train import train as fit

    device = _device(config.device)
    torch.manual_seed(config.seed)
    data = _data(config.data)
    data = data.to(device) if config.resident else data
    plan = measured(OmegaConf.to_container(config, resolve=True), data)
    recipe = describe(plan, data)
    model = _place(_instantiate(recipe["model"], "model"), device)
    training, loss = _instantiate(plan["train"], "train"), _instantiate(plan["loss"], "loss")
    _check_model(model, data, 0 if training.augment is None else training.augment.labels)
    loss_eps = model.sde.cutoffs.training if loss.eps is None else loss.eps
    model.sde.check_eps(loss_eps)
    samplers = {
        name: _instantiate(value, f"samplers.{name}")
        for name, value in (plan.get("samplers") or {}).items()
    }
    exact = _instantiate(plan["likelihood"], "likelihood")
    for tool in (*samplers.values(), exact):
        tool.check(model)

    log.info("Training %s: %d steps on %s.", config.name, training.steps, device)
    clock = time.perf_counter()
    average = fit(
        model,
        data,
        loss,
        training,
        _instantiate(plan["optimizer"], "optimizer"),
        folder,
        recipe=recipe,
        seed=config.seed,
        progress=config.progress,
    )
    trained = Trained(
        name=config.name,
        model=average,
        data=data,
        seconds=time.perf_counter() - clock,
        seed=config.seed,
        facts=[("training", f"{training.steps} steps of {training.batch_size} examples")],
        configuration=OmegaConf.to_yaml(plan),
    )
    results = report_training(
        trained,
        samplers,
        exact,
        folder,
        count=config.count,
        examples=config.examples,
        batch_size=config.batch_size,
        baselines=config.baselines,
        progress=config.progress,
    )
    log.info("%s", format_table([{"result": k, "value": v} for k, v in results.items()]))
    log.info("Report: %s", folder / "report.html")
    return results


def sample(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Draws samples of a checkpoint."""
    from scoresde.data import Units
    from scoresde.tasks.sampling import draw_samples, save_samples

    checkpoint, model = _load(config)
    units = checkpoint.build("units", Units, _allowed(config))
    sampler = _instantiate(config.sampler, "sampler")
    drawn = draw_samples(
        model,
        sampler,
        units,
        config.count,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=config.progress,
    )
    save_samples(drawn, units, folder)
    log.info("%d samples in %.1f s: %s", config.count, drawn.seconds, folder)
    return {"nfe": float(drawn.nfe.double().mean()), "seconds": drawn.seconds}


def likelihood(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluates a checkpoint on a split of its data, or of the data given."""
    from scoresde.tasks.evaluation import check_draws, evaluate_likelihood
    from scoresde.tasks.likelihood import Evaluated, check_comparable, report_likelihood

    checkpoint, model = _load(config)
    data = _evaluated_data(checkpoint, config).to(model.device)
    _check_model(model, data)
    exact = _likelihood(checkpoint, config)
    draws = _draws(config)
    check_draws(data, draws)
    sets = {PARTS: data}
    if config.get("ood") is not None:
        other = replace(_data(config.ood).to(model.device), scaling=data.scaling)
        check_comparable(data, other)
        sets["parts_ood"] = other
    evaluated = []
    for name, one in sets.items():
        identity = _identity(checkpoint, config, one, exact, draws)
        parts = Parts(folder / name, _rank()).claim(identity)
        evaluation = evaluate_likelihood(
            model,
            exact,
            one,
            config.split,
            examples=config.examples,
            batch_size=config.batch_size,
            draws=draws,
            seed=config.seed,
            parts=parts,
            progress=config.progress and _rank().index == 0,
        )
        evaluated.append(Evaluated(one, evaluation))
    if _rank().index > 0:
        return {}
    results = report_likelihood(
        evaluated[0],
        evaluated[1] if len(evaluated) > 1 else None,
        folder,
        title=checkpoint.recipe.get("name", "a model"),
        facts=[("likelihood", str(exact)), ("SDE", str(model.sde))],
        configuration=OmegaConf.to_yaml(config),
    )
    _say(config, evaluated, results, folder)
    return {**results, "likelihood": str(exact)}


def _likelihood(checkpoint: Any, config: DictConfig) -> Any:
    from scoresde.bound import VariationalBound
    from scoresde.likelihood import Likelihood

    exact = _merged(checkpoint, "likelihood", object, config)
    if not isinstance(exact, Likelihood | VariationalBound):
        raise InputError(
            f"likelihood is a {type(exact).__name__}; give a Likelihood or a VariationalBound."
        )
    return exact


def _draws(config: DictConfig) -> Any:
    """Returns how integers are dequantised, or None for the plain way."""
    from scoresde.tasks.evaluation import Draws

    if config.draws == 1 and not _given("dequantisation"):
        if config.weighted:
            raise InputError("weighted=true has no effect on a single draw; give draws=16, say.")
        return None
    return Draws(
        config.draws, _instantiate(config.dequantisation, "dequantisation"), config.weighted
    )


def _identity(
    checkpoint: Any, config: DictConfig, data: Any, exact: Any, draws: Any
) -> dict[str, str]:
    """What an evaluation's numbers depend on, in words; where the files lie is no part of it."""
    weights = checkpoint.ema if config.weights == "average" else checkpoint.model
    plan = json.dumps(checkpoint.recipe.get("model"), sort_keys=True, default=str)
    print_ = _fingerprint(plan, *(part for pair in sorted(weights.items()) for part in pair))
    values = data.split(config.split)
    kind = f"{data.name}, {tuple(values.shape)}, levels {data.levels}, {data.scaling}"
    return {
        "checkpoint": f"step {checkpoint.step}, {print_}",
        "data": f"{kind}, {_fingerprint(values)}",
        "split": config.split,
        "likelihood": str(exact),
        "draws": str(draws),
        "seed": str(config.seed),
        "weights": config.weights,
        "batch_size": str(config.batch_size),
    }


def _fingerprint(*parts: str | torch.Tensor) -> str:
    """Returns 16 digits that change with any text, number or order of rows."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            raw = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def _say(config: DictConfig, evaluated: Sequence[Any], results: Any, folder: Path) -> None:
    for one in evaluated:
        e = one.evaluation
        log.info(
            "%s: %.4f ± %.4f %s (%d examples, NFE %.0f, %.1f s): %s",
            e.split if len(evaluated) == 1 else one.title,
            e.mean,
            e.standard_error,
            e.unit,
            len(e.values),
            e.summary()["nfe"],
            e.seconds,
            folder / "likelihood.json",
        )
    if "auroc" in results:
        log.info("AUROC: %.4f ± %.4f", results["auroc"], results["auroc_standard_error"])
    log.info("Report: %s", folder / "report.html")


def import_(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Turns a checkpoint of another program into one of ours."""
    from scoresde.tasks.importing import import_checkpoint, read_foreign

    if config.checkpoint is None:
        raise InputError("task=import needs checkpoint=FILE.pth, or a folder of diffusers.")
    reference = config.reference
    if isinstance(reference, DictConfig):
        reference = OmegaConf.to_container(reference, resolve=True)
    imported = read_foreign(config.checkpoint, reference)
    plan = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plan, dict)
    parts = {key: plan[key] for key in ("name", "likelihood")}
    data = plan["data"] if _given("data") else None
    checkpoint = import_checkpoint(imported, folder, parts, data)
    parameters = sum(value.numel() for value in checkpoint.ema.values())
    log.info("%d numbers, step %d: %s", parameters, checkpoint.step, folder / "checkpoint.pt")
    return {"parameters": parameters, "step": checkpoint.step}


# --- Building objects ----------------------------------------------------------------------------


def measured(plan: Any, data: Any) -> Any:
    """Fills in what the data decide, ``shape: null`` and ``sigma_data: auto``, wherever it is."""
    if isinstance(plan, list):
        return [measured(value, data) for value in plan]
    if not isinstance(plan, dict):
        return plan
    plan = {k: v if k == "data" else measured(v, data) for k, v in plan.items()}
    if plan.get("sigma_data") == "auto":
        plan["sigma_data"] = round(data.sigma_data, 4)
    if "shape" in plan and plan["shape"] is None:
        plan["shape"] = list(data.shape)
    return plan


def describe(plan: dict[str, Any], data: Any) -> dict[str, Any]:
    """Returns the recipe of a run: plain values from which a checkpoint can be rebuilt."""
    parts = ("network", "sde", "parametrisation", "label")
    kept = ("name", "data", "loss", "optimizer", "train", "likelihood", "samplers")
    return {
        "model": {"_target_": "scoresde.ScoreModel", **{key: plan[key] for key in parts}},
        "units": {"_target_": "scoresde.data.Units", **data.units.describe()},
        **{key: plan.get(key) for key in kept},
    }


def _instantiate(section: Any, name: str) -> Any:
    if section is None:
        raise InputError(f"{name} is empty; give it a value, or remove it by ~{name}.")
    return hydra.utils.instantiate(section, _convert_="all")


def _data(section: Any) -> Any:
    from scoresde.data import Dataset

    data = _instantiate(section, "data")
    if not isinstance(data, Dataset):
        raise InputError(
            f"data._target_ gave a {type(data).__name__}; it must return a scoresde.data.Dataset "
            "(see Dataset.of)."
        )
    return data


def _load(config: DictConfig) -> tuple[Any, Any]:
    """Reads the checkpoint and rebuilds its model."""
    from scoresde.train import Checkpoint

    if config.checkpoint is None:
        raise InputError(f"task={config.task} needs checkpoint=RUN_FOLDER_OR_FILE.")
    if config.weights not in ("average", "raw"):
        raise InputError(f"weights={config.weights} is unknown; give average or raw.")
    device = _device(config.device)
    checkpoint = Checkpoint.load(config.checkpoint)
    model = checkpoint.build_model(_allowed(config), average=config.weights == "average")
    return checkpoint, _place(model, device)


def _allowed(config: DictConfig) -> Sequence[str]:
    return [config.allow] if isinstance(config.allow, str) else list(config.allow or [])


def _merged(checkpoint: Any, section: str, kind: type, config: DictConfig) -> Any:
    """Builds a section of the checkpoint with what the command line changes of it.

    ``section=NAME`` replaces it whole; ``section.key=value`` changes that value alone.
    """
    given = _given(section)
    if any(text.startswith(f"{section}=") for text in given):
        return _data(config.data) if section == "data" else _instantiate(config[section], section)
    changed = checkpoint
    for text in given:
        key = text.partition("=")[0].removeprefix(f"{section}.")
        changed = changed.with_value(section, key, OmegaConf.select(config, f"{section}.{key}"))
    return changed.build(section, kind, _allowed(config))


def _evaluated_data(checkpoint: Any, config: DictConfig) -> Any:
    """Returns the checkpoint's data, or the data given in the checkpoint's units."""
    from scoresde.data import Dataset, Units

    if "data" not in checkpoint.recipe and not any(
        text.startswith("data=") for text in _given("data")
    ):
        raise InputError(
            "The checkpoint does not say its data; give some, such as data=folder "
            "data.path=FOLDER."
        )
    data = _merged(checkpoint, "data", Dataset, config)
    units = checkpoint.build("units", Units, _allowed(config))
    if (tuple(data.shape), data.levels) != (tuple(units.shape), units.levels):
        raise InputError(
            f"The data have the shape {tuple(data.shape)} and levels={data.levels}, the model's "
            f"{tuple(units.shape)} and levels={units.levels}; give data of the same kind."
        )
    return replace(data, scaling=units.scaling)


def _place(model: Any, device: torch.device) -> Any:
    """Moves a model to its device, with the memory layout in which convolutions are fastest."""
    return model.to(device, memory_format=torch.channels_last)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        # Each process of torchrun takes the next GPU of its machine.
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device={name} cannot be used on this machine ({str(error).splitlines()[0]}); give "
            "auto or cpu."
        ) from error
    return device


@torch.no_grad()
def _check_model(model: Any, data: Any, labels: int = 0) -> None:
    """Tries the model on one example, so that a misfit is a sentence and not a crash later."""
    from scoresde.streams import Streams

    x = data.batch("test", Streams.of(0, batch=1)).to(model.device)
    cond = {"augment": x.new_zeros(1, labels)} if labels else {}
    try:
        model.noise(x, torch.full((1,), 0.5, device=x.device), **cond)
    except (RuntimeError, TypeError, IndexError) as error:
        raise InputError(
            f"The network cannot take data of shape {tuple(data.shape)}: "
            f"{' '.join(str(error).split())}; choose another network, or give it that shape."
        ) from error


# --- Hydra's hooks -------------------------------------------------------------------------------


class Callbacks(Callback):
    """Checks the output folder before Hydra writes into it, and sums up a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before a single run."""
        _make_folder(config.hydra.run.dir)
        _refuse_second_run(config.get("task"), Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before a sweep."""
        if list(Path(config.hydra.sweep.dir).glob("*/result.json")):
            fail(
                f"The folder {config.hydra.sweep.dir} holds a sweep already; choose another by "
                "hydra.sweep.dir=FOLDER."
            )
        _make_folder(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called after a sweep: writes and prints the table, and fails if a job did."""
        folder = Path(config.hydra.sweep.dir)
        rows = summarise(folder)
        print(format_table(rows))
        print(f"Table: {folder / 'summary.csv'}")
        if any(row["status"] != "ok" for row in rows):
            sys.exit(1)


def _make_folder(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(
            f"The output folder {folder} cannot be written ({error.strerror}); choose another by "
            "hydra.run.dir=FOLDER (for a sweep hydra.sweep.dir=FOLDER)."
        )


if __name__ == "__main__":
    main()
