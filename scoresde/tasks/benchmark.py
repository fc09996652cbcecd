"""Benchmark of a recipe on this machine: training, sampling, likelihoods and checkpoints.

Timings of the variants of a training step alternate, so load on the machine slows all of them
alike. Compare the ratios of their medians.
"""

import copy
import ctypes
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scoresde.data import Batch, Dataset
from scoresde.likelihood import LogProb
from scoresde.loss import Loss
from scoresde.model import ScoreFunction
from scoresde.nn.speed import LAYOUTS, PRECISIONS, can_compile, channels_last
from scoresde.sample import Sampler
from scoresde.train import Checkpoint, Training, Update
from scoresde.train.loop import batches

TABLE = "benchmark.md"
_WARM = 3  # untimed steps, for compiling kernels and allocating memory

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Variant:
    """A variant of the computation of a training step.

    Arguments:
        name: The name of the variant.
        precision: The data type of the network's computation.
        channels_last: Whether images have the memory layout channels-last.
        compile: As ``train.compile``.
        fused: Whether to use the fused kernel of Adam.
    """

    name: str
    precision: str = "float32"
    channels_last: bool = False
    compile: bool | str = False
    fused: bool = False


EAGER = Variant("eager float32")
LAID_OUT = replace(EAGER, name="+ channels-last, fused Adam", channels_last=True, fused=True)
COMPILED = replace(LAID_OUT, name="+ compile", compile=True)
HALF = replace(LAID_OUT, name="+ bf16", precision="bf16")
HALF_COMPILED = replace(HALF, name="+ bf16, compile", compile=True)
GRAPHS = replace(HALF_COMPILED, name="+ CUDA graphs", compile="reduce-overhead")
VARIANTS = {
    "cpu": (EAGER, LAID_OUT, COMPILED),
    "cuda": (EAGER, LAID_OUT, HALF, COMPILED, HALF_COMPILED, GRAPHS),
}


@dataclass(frozen=True)
class Bench:
    """Objects to measure.

    Arguments:
        model: The model, on its device.
        data: Examples of the model's kind.
        loss: The loss.
        training: Training settings.
        optimizer: Callable that builds an optimiser; it accepts ``fused``.
        rounds: Number of timing rounds.
    """

    model: ScoreFunction
    data: Dataset
    loss: Loss
    training: Training
    optimizer: Callable[[bool], Make]
    rounds: int = 5

    @property
    def device(self) -> torch.device:
        """The device of the measurements."""
        return self.model.device


# --- Training ------------------------------------------------------------------------------------


def training_steps(bench: Bench, size: int, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Times a training step of each variant; variants alternate.

    Returns:
        For each variant the median seconds per step, examples/s, the ratio to the first variant,
        the memory in GiB, and the share of the device's peak of matrix products.
    """
    steps, memory = {}, {}
    operations = _operations(bench, size)
    for variant in variants:
        before = _in_use(bench.device)
        steps[variant.name] = _step(bench, size, variant)
        memory[variant.name] = _peak(bench.device, steps[variant.name]) - before
    times = in_turns(steps, bench.rounds, bench.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = medians[variants[0].name]
    rows = []
    for variant in variants:
        seconds = medians[variant.name]
        peak = products_per_second(bench.device, variant.precision)
        rows.append(
            {
                "batch": size,
                "variant": variant.name,
                "seconds": seconds,
                "examples_per_second": size / seconds,
                "of_eager": seconds / first,
                "memory_gib": memory[variant.name],
                "share_of_peak": operations / seconds / peak,
            }
        )
    return rows


def loop_overhead(bench: Bench, size: int, variant: Variant) -> dict[str, float]:
    """Times a step of the training loop next to a bare forward, backward and update.

    The bare step uses torch's own noise and has no data loading, clipping, average or checks. The
    two alternate, on the same model. The data loading is measured separately.

    Returns:
        The minimum seconds of both, which other load affects least, their ratio minus one
        (``overhead``), and the share of the ``data`` in a step.
    """
    training = replace(bench.training, precision=variant.precision, compile=variant.compile)
    model = _prepared(bench, variant)
    update = Update(model, bench.loss, training, bench.optimizer(variant.fused))
    source = batches(bench.data, size, 0, training.augment)
    numbers = iter(range(10**9))

    def feed() -> Batch:
        return _on_device(bench, next(source))

    def whole() -> None:
        batch = feed()
        update(batch.x, batch.cond, next(numbers), size)

    first, eps = feed(), model.sde.cutoffs.training
    x = first.x

    def bare() -> None:
        update.optimiser.zero_grad(set_to_none=True)
        t = eps + (1 - eps) * torch.rand(len(x), device=x.device)
        with training.autocast(x.device):
            value = bench.loss(model, x, t, torch.randn_like(x), **first.cond).mean()
        value.backward()
        update.optimiser.step()

    times = in_turns({"bare": bare, "loop": whole, "data": feed}, bench.rounds, bench.device)
    least = {name: min(values) for name, values in times.items()}
    return {
        "bare_seconds": least["bare"],
        "loop_seconds": least["loop"],
        "overhead": least["loop"] / least["bare"] - 1,
        "data": least["data"] / least["loop"],
    }


def _prepared(bench: Bench, variant: Variant) -> ScoreFunction:
    model = copy.deepcopy(bench.model)
    layout = channels_last(model) if variant.channels_last else torch.contiguous_format
    return model.to(bench.device, memory_format=layout).train()  # type: ignore[call-overload]


def _step(bench: Bench, size: int, variant: Variant) -> Callable[[], None]:
    training = replace(bench.training, precision=variant.precision, compile=variant.compile)
    make = bench.optimizer(variant.fused)
    update = Update(_prepared(bench, variant), bench.loss, training, make)
    batch = _examples(bench, size)
    x = batch.x.contiguous()
    if variant.channels_last:
        x = x.contiguous(memory_format=LAYOUTS.get(x.ndim, torch.contiguous_format))

    def step() -> None:
        update(x, batch.cond, 0, size)

    return step


def _examples(bench: Bench, size: int) -> Batch:
    return _on_device(bench, next(batches(bench.data, size, 0)))


def _on_device(bench: Bench, batch: Batch) -> Batch:
    """Returns a batch on the model's device, in the model's form."""
    model = bench.model
    return Batch(model.state(batch.x.to(model.device)), model.select(batch.cond))


def _operations(bench: Bench, size: int) -> int:
    """Counts the floating-point operations of a forward and a backward pass."""
    batch = _examples(bench, size)
    model = copy.deepcopy(bench.model)
    with FlopCounterMode(display=False) as counter:
        bench.loss(model, batch.x, seed=0, **batch.cond).mean().backward()
    return counter.get_total_flops()


def products_per_second(device: torch.device, precision: str, size: int | None = None) -> float:
    """Measures the operations per second of a large matrix product, the device's peak."""
    size = size or (8192 if device.type == "cuda" else 1536)
    dtype = PRECISIONS[precision] or torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = in_turns({"product": lambda: a @ a}, 5, device)["product"]
    return 2 * size**3 / min(times)


# --- Sampling, likelihoods, checkpoints ----------------------------------------------------------


def sampling(bench: Bench, sampler: Sampler, size: int) -> dict[str, float]:
    """Times a sampler; returns seconds, examples/s and network evaluations."""
    model, shape = bench.model.eval(), (size, *bench.data.shape)
    cond = _examples(bench, size).cond
    passes: list[float] = []

    def draw() -> None:
        passes.append(float(sampler(model, shape, seed=0, **cond).nfe.double().mean()))

    times = in_turns({"draw": draw}, bench.rounds, bench.device, warm=1)["draw"]
    seconds = statistics.median(times)
    return {"seconds": seconds, "examples_per_second": size / seconds, "nfe": passes[-1]}


def likelihoods(bench: Bench, likelihood: LogProb, size: int) -> dict[str, float]:
    """Times a likelihood; returns seconds, examples/s and network evaluations."""
    model = bench.model.eval()
    at_levels = likelihood.levels is not None
    data = replace(bench.data, dequantise=False) if at_levels else bench.data
    batch = _examples(replace(bench, data=data), size)
    passes: list[float] = []

    def evaluate() -> None:
        result = likelihood(model, batch.x, seed=0, **batch.cond)
        passes.append(float(result.nfe.double().mean()))

    times = in_turns({"evaluate": evaluate}, bench.rounds, bench.device, warm=0)["evaluate"]
    seconds = statistics.median(times)
    return {"seconds": seconds, "examples_per_second": size / seconds, "nfe": passes[-1]}


def checkpoints(bench: Bench) -> dict[str, float]:
    """Times a checkpoint of weights, average and Adam: seconds to write and to read, and GiB."""
    model = copy.deepcopy(bench.model)
    optimiser = bench.optimizer(False)(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    weights = model.state_dict()
    checkpoint = Checkpoint({}, weights, weights, 0, 0, optimizer=optimiser.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        times = in_turns(
            {"write": lambda: checkpoint.save(path), "read": lambda: Checkpoint.load(path)},
            min(bench.rounds, 3),
            bench.device,
            warm=1,
        )
        size = path.stat().st_size
    write, read = (statistics.median(times[name]) for name in ("write", "read"))
    return {"write_seconds": write, "read_seconds": read, "gib": size / 2**30}


# --- Clocks --------------------------------------------------------------------------------------


def in_turns(
    acts: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm: int = _WARM,
) -> dict[str, list[float]]:
    """Times several callables alternately; returns the seconds of each round."""
    for act in acts.values():
        for _ in range(warm):
            act()
    times: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            _wait(device)
            clock = time.perf_counter()
            act()
            _wait(device)
            times[name].append(time.perf_counter() - clock)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_use(device: torch.device) -> float:
    """Returns the memory in use in GiB, of a GPU or this process (NaN if unknown)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    with suppress(OSError, AttributeError):  # glibc may still hold freed memory
        ctypes.CDLL(None).malloc_trim(0)
    return _of_process("VmRSS")


def _peak(device: torch.device, act: Callable[[], object]) -> float:
    """Returns the peak memory in GiB while ``act`` is called twice."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # only on Linux; see proc(5)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(2):
        act()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _of_process("VmHWM")


def _of_process(field: str) -> float:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return float("nan")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) / 2**20  # from KiB


# --- All of it -----------------------------------------------------------------------------------


def measure(
    bench: Bench, sizes: Sequence[int], sampler: Sampler, likelihood: LogProb | None
) -> dict[str, Any]:
    """Measures training at each batch size, and everything else at the first batch size."""
    variants, size = VARIANTS[bench.device.type], sizes[0]
    if any(variant.compile for variant in variants) and not can_compile(bench.device):
        variants = tuple(variant for variant in variants if not variant.compile)
    training = [row for n in sizes for row in training_steps(bench, n, variants)]
    best = min((r for r in training if r["batch"] == size), key=lambda row: row["seconds"])
    fastest = next(v for v in variants if v.name == best["variant"])
    return {
        "hardware": _hardware(bench.device),
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "batch": size,
        "training": training,
        "loop": {"variant": fastest.name, **loop_overhead(bench, size, fastest)},
        "sampling": sampling(bench, sampler, size),
        "likelihood": None if likelihood is None else likelihoods(bench, likelihood, size),
        "checkpoint": checkpoints(bench),
    }


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Writes ``benchmark.json`` and ``benchmark.md``."""
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(table(results), encoding="utf-8")


def table(results: Mapping[str, Any]) -> str:
    """Returns the results as a page of Markdown."""
    columns = ("batch", "variant", "seconds", "examples/s", "of eager", "GiB", "share of peak")
    lines = [
        f"{results['hardware']}; {results['parameters'] / 1e6:.1f} M parameters",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in results["training"]:
        lines.append(
            f"| {row['batch']} | {row['variant']} | {row['seconds']:.4g} "
            f"| {row['examples_per_second']:.4g} | {row['of_eager']:.2f} "
            f"| {_gib(row['memory_gib'])} | {100 * row['share_of_peak']:.0f} % |"
        )
    loop, drawn, file = results["loop"], results["sampling"], results["checkpoint"]
    lines += [
        "",
        f"- loop ({loop['variant']}): {100 * loop['overhead']:+.1f} % over the bare step of "
        f"{loop['bare_seconds']:.4g} s; data {100 * loop['data']:.2f} % of a step",
        f"- sampling: {drawn['examples_per_second']:.4g} examples/s ({drawn['nfe']:.0f} passes)",
    ]
    if results["likelihood"]:
        exact = results["likelihood"]
        lines.append(
            f"- likelihood: {exact['examples_per_second']:.4g} examples/s ({exact['nfe']:.0f} "
            "passes)"
        )
    lines.append(
        f"- checkpoint of {file['gib']:.2f} GiB: written in {file['write_seconds']:.2g} s, "
        f"read in {file['read_seconds']:.2g} s"
    )
    return "\n".join(lines) + "\n"


def _gib(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
