"""The command line: composes a configuration, builds its objects, and calls a task.

Exit codes: 0, done; 1, Hydra rejected the configuration, or a job of a sweep failed; 2, the input
is invalid, for the printed reason; 75, SIGTERM stopped the training with a checkpoint, and it can
be resumed; 130, interrupted.
"""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import time
import traceback
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from scoresde.commands import RESUMED, TASKS, rank_of
from scoresde.configuration import GROUPS, check
from scoresde.errors import InputError, OtherRunError, SolverError
from scoresde.progress import silent
from scoresde.recipe import current
from scoresde.tasks.folder import Hold, keep_settings, put_back_settings, read_result
from scoresde.tasks.parts import Rank
from scoresde.tasks.report import save_result
from scoresde.tasks.runs import describe_runs
from scoresde.tasks.summary import draw_quality, format_table, summarise
from scoresde.train import ProcessGroup, TrainingStopped, process_group

log = logging.getLogger("scoresde")

# In a checkout that is not installed, conf/ is not a package; it is next to scoresde/.
CONF = "pkg://scoresde.conf" if find_spec("scoresde.conf") else "../conf"
_CHOICES = (*GROUPS, "guidance", "method", "operator", "data@ood")
_PLAIN = r"null|true|false|[-+]?\d+(\.\d*)?"  # values that Hydra does not read as names
INPUT_ERROR, STOPPED, INTERRUPTED = 2, 75, 130


def main() -> None:
    """Runs the program on the command line's arguments."""
    # A console script, unlike "python -m", does not import modules from the current folder.
    sys.path.insert(0, os.getcwd())
    if sys.argv[1:2] == ["runs"]:
        _list(sys.argv[2:])
        return
    # The other data set is an option of the group data, at the key ood.
    sys.argv[1:] = [f"data@{t}" if t.startswith("ood=") else t for t in sys.argv[1:]]
    for text in sys.argv[1:]:
        _check_choice(text)
        _check_quotes(text, sweeping=not {"-m", "--multirun"}.isdisjoint(sys.argv[1:]))
    with process_group() as group:
        if group.size > 1:
            sys.argv[1:] = _in_one_folder(sys.argv[1:], group)
        try:
            _main()
        except SystemExit as left:
            if left.code == 1:  # Hydra has named the rejected key, but not its new name
                sys.stderr.writelines(map(_advice, sys.argv[1:]))
            raise


def _check_choice(text: str) -> None:
    """Exits if a group is set to a value that Hydra does not read as the name of an option."""
    name, _, value = text.partition("=")
    if name in _CHOICES and re.fullmatch(_PLAIN, value):
        name = name.removeprefix("data@")
        fail(
            f"{name} must be one of its options, got {value}; remove {name}={value}, or choose an "
            "option of scoresde --help."
        )


def _check_quotes(text: str, sweeping: bool) -> None:
    """Exits with the required quotes, if Hydra cannot parse a value without them."""
    key, equals, value = text.partition("=")
    structure = value[:1] + value[-1:] in ("[]", "{}")
    if text.startswith("-") or not equals or structure or _parses(text):
        return
    quoted = ",".join(map(_quoted, value.split(",") if sweeping else [value]))
    if _parses(f"{key}={quoted}"):
        fail(
            f"{key} must be quoted for Hydra, got {value}; use {shlex.quote(f'{key}={quoted}')}, "
            "with both pairs of quotes in a shell."
        )


def _parses(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """Returns a text in the quotes of Hydra's grammar."""
    # Backslashes are special only before a quote, where each is written twice.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: 2 * m[1] + (m[2] and '\\"'), value)
    return f'"{escaped}"'


def _override(key: str, value: object) -> str:
    """Returns an override, quoted for a shell."""
    text = f"{key}={value}"
    return shlex.quote(text if _parses(text) else f"{key}={_quoted(str(value))}")


def _advice(text: str) -> str:
    """Returns advice on an override that Hydra rejects, or an empty text."""
    section, _, rest = text.lstrip("+").partition(".")
    key, _, value = rest.partition("=")
    now = current(f"scoresde.nn.UNet.{key}")
    if section != "network":
        return _nearest(text.partition("=")[0])
    if not now.startswith("scoresde."):
        return f"scoresde: network.{key} is now network.{now}; use ++network.{now}={value}.\n"
    if key.startswith("attention."):
        return (
            "scoresde: if network.attention is a list of levels, use ~network.attention "
            "'+network.attention={levels:[1],heads:4}'.\n"
        )
    return _nearest(text.partition("=")[0])


def _nearest(name: str) -> str:
    """Returns the nearest option to one that does not exist, or the choices that have it."""
    section, _, key = name.rpartition(".")
    options = _options(section)
    choices = sorted(choice for choice, keys in options.items() if key in keys)
    if name.startswith(("+", "~", "-", "hydra.")) or "" in choices:
        return ""
    if choices:
        others = ", ".join(choices)
        return f"scoresde: {name} is an option of other choices of {section}: {others}.\n"
    near = get_close_matches(key, sorted(set().union(*options.values())), 1)
    prefix = f"{section}." if section else ""
    return f"scoresde: {name} is not an option; use {prefix}{near[0]}.\n" if near else ""


def _options(section: str) -> dict[str, set[str]]:
    """Returns the keys of a section for each of its choices; those of the program under ''."""
    spec = find_spec("scoresde.conf")
    found = spec.submodule_search_locations if spec else None
    folder = Path(found[0]) if found else Path(__file__).parent.parent / "conf"
    trees = {path.stem: path for path in (folder / section).glob("*.yaml") if section}
    loaded = {choice: OmegaConf.load(path) for choice, path in trees.items()}
    whole = OmegaConf.load(folder / "config.yaml")
    loaded[""] = OmegaConf.select(whole, section) if section else whole
    keys = {
        c: {str(k) for k in tree} for c, tree in loaded.items() if isinstance(tree, DictConfig)
    }
    return keys if section else {"": keys[""] | set(GROUPS)}


def _list(arguments: list[str]) -> None:
    """Lists runs: ``scoresde runs [FOLDER] [--json]``."""
    places = [text for text in arguments if text != "--json"]
    if len(places) > 1 or any(text.startswith("-") for text in places):
        fail(f"scoresde runs accepts one folder and --json, got {' '.join(arguments)}.")
    try:
        print(describe_runs(Path(*places or ["runs"]), as_json="--json" in arguments))
    except (InputError, OSError) as error:
        fail(explain(error) or str(error))


def _in_one_folder(arguments: list[str], group: ProcessGroup) -> list[str]:
    """Sets one run folder for all processes, unless the user has; their clocks differ."""
    stamp = group.agree(time.strftime("%Y-%m-%d_%H-%M-%S"))
    if any(text.startswith("hydra.run.dir=") for text in arguments):
        return arguments
    return [*arguments, f"hydra.run.dir=runs/${{name}}/${{task}}_{stamp}"]


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _main(config: DictConfig) -> None:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    result: dict[str, Any] = {"task": config.get("task"), "overrides": overrides}
    rank, before = rank_of(), read_result(folder)
    held = _held(config, folder, rank)
    save_result(folder, {"status": "running", **result}, rank.index)
    try:
        check(config)
        _check_rank(config, rank)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with silent(not config.progress):
            result |= {"status": "ok", **_run(config, folder)}
        save_result(folder, result, rank.index)
    except TrainingStopped as stop:
        save_result(folder, {**result, "status": "stopped", "step": stop.step}, rank.index)
        again = _override("hydra.run.dir", folder)
        print(f"{stop}; to resume, repeat the command with {again}.", file=sys.stderr)
        sys.exit(INTERRUPTED if stop.signal == signal.SIGINT else STOPPED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = explain(error)
        message = sentence or f"{type(error).__name__}: {error}"
        failed = {**result, "status": "failed", "error": message}
        # The state of a finished or different run is kept if this command does not resume it.
        refused = isinstance(error, OtherRunError)
        stays = before.get("status") == "ok" or (before and refused)
        save_result(folder, before if stays else failed, rank.index)
        if refused and rank.index == 0:
            put_back_settings()
        if not sweeping and sentence is None:
            raise
        if not sweeping:
            fail(message)
        # The other jobs of a sweep continue; this job becomes a row with its error.
        log.error("Job failed: %s", message)
        if sentence is None:
            log.error(traceback.format_exc())
    finally:
        if held is not None:
            held.close()


def _held(config: DictConfig, folder: Path, rank: Rank) -> Hold | None:
    """Locks the folder; the lock is shared if several processes may work in it."""
    shared = config.get("task") in RESUMED
    if rank.index > 0 and not shared:
        return None  # the first process of a training run has locked it
    try:
        return Hold(folder, shared)
    except OtherRunError as error:
        put_back_settings()
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Prints one sentence and exits with the code for invalid input."""
    print(f"scoresde: {message}", file=sys.stderr)
    sys.exit(INPUT_ERROR)


def explain(error: BaseException) -> str | None:
    """Returns the message of an error caused by the input, or None for an internal error."""
    match error:
        case InputError() | SolverError():
            return str(error)
        case InstantiationException():
            inner = error.__cause__
            if isinstance(inner, InputError):
                return str(inner)
            given = ", ".join(HydraConfig.get().overrides.task) or "nothing"
            return f"{_one_line(error)} Check these overrides: {given}."
        case MissingMandatoryValue():
            return f"{error.full_key} is required; set {error.full_key}=VALUE."
        case OmegaConfBaseException():
            return _one_line(error)
        case torch.OutOfMemoryError():
            return "The device is out of memory; set a smaller train.batch_size or batch_size."
        case OSError() if error.filename is not None:
            return f"{error.filename}: {error.strerror}{_remedy(error)}."
    return None


def _one_line(error: BaseException) -> str:
    hint = "set env var HYDRA_FULL_ERROR=1 to see chained exception."
    return " ".join(str(error).replace(hint, "").split())


def _remedy(error: OSError) -> str:
    """Returns the remedy for an error of the file system, after a semicolon, or an empty text."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; free space, or choose another folder"
    return "; choose another folder" if error.errno in (errno.EACCES, errno.EROFS) else ""


def _check_rank(config: DictConfig, rank: Rank) -> None:
    if rank.size == 1:
        return
    if config.task == "train" and ProcessGroup.here().size != rank.size:
        raise InputError(
            f"Multi-process training must be launched with torchrun, got {rank.size} processes "
            "from another launcher."
        )
    if config.task not in (*RESUMED, "train"):
        raise InputError(
            f"task={config.task} must run in one process, got {rank.size}; run it without "
            "torchrun."
        )
    if not any(text.startswith("hydra.run.dir=") for text in HydraConfig.get().overrides.hydra):
        raise InputError(
            f"{rank.size} processes must share one run folder; set hydra.run.dir=FOLDER."
        )


def _refuse_second_run(task: str | None, folder: Path) -> None:
    if not (folder / "result.json").exists():
        return
    before = read_result(folder)
    # These tasks resume if the same result is requested: their stored batches, or the checkpoint
    # of a training run, identify it.
    unfinished = task == "train" and before.get("status") != "ok"
    if before.get("task") != task or not (task in RESUMED or unfinished):
        fail(f"The folder {folder} already holds a run; choose another with hydra.run.dir=FOLDER.")


def _run(config: DictConfig, folder: Path) -> dict[str, Any]:
    if config.task not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {config.task}.")
    return TASKS[config.task](config, folder)


# --- Hydra's hooks -------------------------------------------------------------------------------


class Callbacks(Callback):
    """Checks the output folder before Hydra writes into it, and summarises a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before a single run."""
        _make_folder(config.hydra.run.dir)
        folder = Path(config.hydra.run.dir)
        _refuse_second_run(config.get("task"), folder)
        keep_settings(folder / str(config.hydra.output_subdir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before a sweep."""
        if list(Path(config.hydra.sweep.dir).glob("*/result.json")):
            fail(
                f"The folder {config.hydra.sweep.dir} already holds a sweep; choose another with "
                "hydra.sweep.dir=FOLDER."
            )
        _make_folder(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called after a sweep: writes and prints the table, and fails if a job did."""
        folder = Path(config.hydra.sweep.dir)
        rows = summarise(folder)
        print(format_table(rows))
        print(f"Table: {folder / 'summary.csv'}")
        figure = draw_quality(rows, folder)
        if figure is not None:
            print(f"Figure: {figure}")
        if any(row["status"] != "ok" for row in rows):
            sys.exit(1)


def _make_folder(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have removed it
    except OSError as error:
        fail(
            f"The output folder {folder} is not writable ({error.strerror}); choose another with "
            "hydra.run.dir=FOLDER (for a sweep hydra.sweep.dir=FOLDER)."
        )


if __name__ == "__main__":
    main()
