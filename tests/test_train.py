"""Training: the average of the weights, checkpoints that cannot run code, and the loop."""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    GaussianModel,
    InputError,
    LearnedSchedule,
    NoiseWeighting,
    Preconditioned,
    RectifiedFlow,
    ScoreModel,
)
from scoresde.codec import Codec
from scoresde.data import Dataset, GeometricAugmentation, two_moons
from scoresde.loss import Loss, LossTerms
from scoresde.nn import MLP, UNet
from scoresde.recipe import build
from scoresde.train import (
    EMA,
    Checkpoint,
    ConstantRate,
    CosineRate,
    Sharded,
    Training,
    Update,
    level_curves,
    read_metrics,
    train,
    training,
)
from scoresde.train.engine import networks
from scoresde.train.loop import batches
from scoresde.train.precision import LossScale
from scoresde.train.validation import LEVELS, error_by_level, log_snr_levels
from tests.models import LearnedParametrisation, Mean

RECIPE = {
    "model": {
        "_target_": "scoresde.ScoreModel",
        "network": {"_target_": "scoresde.nn.MLP", "shape": [2], "width": 8, "depth": 1},
        "sde": {"_target_": "scoresde.VPSDE", "beta_min": 0.1, "beta_max": 20.0},
        "parametrisation": {"_target_": "scoresde.Preconditioned", "sigma_data": 1.0},
    }
}


def small_model() -> ScoreModel:
    torch.manual_seed(0)
    return ScoreModel(MLP(2, width=8, depth=1), VPSDE(), Preconditioned(1.0))


def fit(folder: Path, steps: int = 4, lr: float = 1e-3, **options: float) -> ScoreModel:
    return train(
        small_model(),
        two_moons(count=100),
        DenoisingScoreMatching(),
        Training(steps=steps, batch_size=16, **options),
        functools.partial(torch.optim.Adam, lr=lr),
        folder,
        recipe=RECIPE,
        progress=False,
    )


def fit_model(
    folder: Path, model: ScoreModel, training: Training, data: Dataset | None = None
) -> ScoreModel:
    make = functools.partial(torch.optim.Adam, lr=1e-3)
    data = data or two_moons(count=100)
    return train(model, data, DenoisingScoreMatching(), training, make, folder, progress=False)


# --- Average -------------------------------------------------------------------------------------


def test_ema_is_the_recursion_with_warm_up() -> None:
    model = small_model()
    ema = EMA(model, decay=0.5)
    expected = [p.detach().clone() for p in model.parameters()]
    for n in range(1, 12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(n)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [
            decay * e + (1 - decay) * p for e, p in zip(expected, model.parameters(), strict=True)
        ]
    for e, p in zip(expected, ema.model.parameters(), strict=True):
        torch.testing.assert_close(p, e)


def test_ema_follows_buffers_and_leaves_the_model_alone() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.weight = nn.Parameter(torch.ones(()))

    model = ScoreModel(Counter(), VPSDE())
    ema = EMA(model, 0.9)
    model.network.seen += 3
    ema.update()
    assert ema.model.network.seen == 3
    assert model.network.weight.requires_grad
    assert not ema.model.network.weight.requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_ema_refuses_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(InputError, match=f"decay .*{decay}"):
        EMA(small_model(), decay)


# --- Schedules -----------------------------------------------------------------------------------


def test_rates_warm_up_and_fall() -> None:
    assert [ConstantRate(warmup=3)(k, 10) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = [CosineRate()(k, 10) for k in range(10)]
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.5)


def test_rate_refuses_a_negative_warm_up() -> None:
    with pytest.raises(InputError, match=r"warmup .*-1"):
        ConstantRate(warmup=-1)


# --- Loop ----------------------------------------------------------------------------------------


def test_every_epoch_sees_each_example_once_in_a_new_order() -> None:
    x = torch.arange(10.0)[:, None]
    data = Dataset.of("numbers", [x, x, x], standardise=False)
    source = batches(data, 5, seed=0)
    epochs = [torch.cat([next(source).x for _ in range(2)]).flatten() for _ in range(3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(10))
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_the_same_for_the_same_seed() -> None:
    data = two_moons(count=60)
    first, second, other = (batches(data, 8, seed=s) for s in (1, 1, 2))
    x = next(first).x
    assert torch.equal(x, next(second).x)
    assert not torch.equal(x, next(other).x)


def test_in_bf16_the_network_computes_in_it_and_the_weights_stay_in_float32(
    tmp_path: Path,
) -> None:
    seen = set()
    model = small_model()
    layer = next(m for m in model.network.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda _layer, _inputs, output: seen.add(output.dtype))
    options = Training(steps=2, batch_size=16, precision="bf16")
    trained = fit_model(tmp_path, model, options)
    assert torch.bfloat16 in seen
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    state = Checkpoint.load(tmp_path).optimizer["state"][0]
    assert state["exp_avg"].dtype == torch.float32


def test_in_bf16_the_loss_is_nearly_that_of_float32(tmp_path: Path) -> None:
    losses = []
    for precision in ("float32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        fit(folder, steps=2, precision=precision)
        losses.append(read_metrics(folder)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_in_fp16_the_loss_is_scaled_and_the_weights_are_nearly_those_of_float32(
    tmp_path: Path,
) -> None:
    states = []
    for precision in ("float32", "fp16"):
        (tmp_path / precision).mkdir()
        fit(tmp_path / precision, steps=10, precision=precision, log_every=5)
        states.append(Checkpoint.load(tmp_path / precision))
    assert read_metrics(tmp_path / "fp16")[0]["loss_scale"] >= 1
    assert states[1].state["scale"][0] >= 1
    for name, value in states[0].model.items():
        torch.testing.assert_close(states[1].model[name], value, rtol=0, atol=5e-3)


def test_a_loss_scale_halves_on_overflow_and_grows_again() -> None:
    scale = LossScale("fp16", torch.device("cpu"))
    start = float(scale.state[0])
    scale.update(torch.tensor(False))
    assert float(scale.state[0]) == start / 2
    for _ in range(2000):
        scale.update(torch.tensor(True))
    assert float(scale.state[0]) == start
    assert bool(scale.excuses(torch.tensor(1.0)))
    assert not bool(scale.excuses(torch.tensor(math.nan)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_is_clipped_to_its_norm(fused: bool) -> None:
    """Plain descent moves by the rate times the clipped gradient, whose norm is the limit."""
    model, limit = small_model(), 1e-3
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    make = functools.partial(torch.optim.SGD, lr=0.1, fused=fused)
    update = Update(model, DenoisingScoreMatching(), Training(clip=limit), make)
    record = update(torch.randn(16, 2), {}, 0, 16)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(record[1]) > limit
    torch.testing.assert_close(float((after - before).norm()), 0.1 * limit, rtol=1e-3, atol=0)


def test_a_compiled_network_trains_alike_and_keeps_the_names_of_its_weights(
    tmp_path: Path,
) -> None:
    states = []
    for choice in (False, True):
        folder = tmp_path / str(choice)
        folder.mkdir()
        fit(folder, steps=2, compile=choice)
        states.append(Checkpoint.load(folder).model)
    plain, compiled = states
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


def test_every_network_of_a_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(training, "can_compile", lambda device: True)
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compiled.append((self, mode)))
    one, two = small_model(), small_model()
    Training(compile="reduce-overhead").prepare(Mean(one, two))
    assert compiled == [(one.network, "reduce-overhead"), (two.network, "reduce-overhead")]


@pytest.mark.parametrize("choice", [True, "reduce-overhead"])
def test_without_a_compiler_nothing_is_compiled(
    choice: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "can_compile", lambda device: False)
    monkeypatch.setattr(nn.Module, "compile", None)
    Training(compile=choice).prepare(small_model())


def test_networks_are_what_is_run_by_its_forward() -> None:
    one, two = small_model().network, small_model().network
    learned = LearnedParametrisation()
    pair = Mean(ScoreModel(one, LearnedSchedule(), learned), ScoreModel(two, VPSDE(), learned))
    pair.more = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2)]), "again": one})
    pair.numbers = nn.ParameterList([torch.ones(2)])
    assert networks(pair) == [one, two, pair.more["a"][0]]


def test_a_plain_function_cannot_be_compiled(tmp_path: Path) -> None:
    model = ScoreModel(lambda x, c: 0 * x, VPSDE())
    with pytest.raises(InputError, match=r"train\.compile .*True"):
        Training(compile=True).prepare(model)


class Told(nn.Module):
    """Remembers what it is told of the augmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.labels: list[torch.Tensor] = []

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, augment: torch.Tensor | None = None
    ) -> torch.Tensor:
        if augment is not None:
            self.labels.append(augment)
        return self.scale * x


def test_the_network_is_told_how_its_images_were_augmented(tmp_path: Path) -> None:
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    data = Dataset.of("grey", [images, images, images], levels=2)
    source = batches(data, 16, seed=0, augment=GeometricAugmentation(1.0))
    network = Told()
    model = ScoreModel(network, VPSDE())
    options = Training(steps=1, batch_size=16, augment=GeometricAugmentation(1.0))
    fit_model(tmp_path, model, options, data)
    (told,) = network.labels  # and the validation data are not augmented
    assert torch.equal(told, next(source).cond["augment"])


def test_training_lowers_the_loss_and_records_it(tmp_path: Path) -> None:
    fit(tmp_path, steps=200, lr=1e-2, log_every=20, validate_every=100)
    records = read_metrics(tmp_path)
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 10
    assert sum(losses[5:]) < sum(losses[:5])
    assert [r["step"] for r in records if "validation_loss" in r] == [100, 200]


def test_training_returns_the_average_that_the_checkpoint_holds(tmp_path: Path) -> None:
    model = fit(tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.step == 4
    rebuilt = checkpoint.build_model()
    for key, value in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[key], value)
    raw = checkpoint.build_model(average=False).state_dict()
    assert any(not torch.equal(raw[key], value) for key, value in model.state_dict().items())


class Breaking(DenoisingScoreMatching):
    """Has no finite value at some steps, counted from 0."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        object.__setattr__(self, "steps", steps)

    def terms(self, model: ScoreModel, x: torch.Tensor, **options: range) -> LossTerms:
        found = super().terms(model, x, **options)
        bad = model.training and options["seeds"].start // len(x) in self.steps
        return LossTerms(found.value * float("nan"), found.parts) if bad else found


def fit_broken(folder: Path, *steps: int, fused: bool = False, **options: int) -> ScoreModel:
    options = {"steps": 20, "log_every": 5, "save_every": 5, "validate_every": 100, **options}
    return train(
        small_model(),
        two_moons(count=100),
        Breaking(*steps),
        Training(batch_size=16, **options),
        functools.partial(torch.optim.Adam, lr=1e-3, fused=fused),
        folder,
        recipe=RECIPE,
        progress=False,
    )


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step 7\b.*nan") as error:
        fit_broken(tmp_path, 6, 8, max_skipped=0)
    assert str(tmp_path / "checkpoint.pt") in str(error.value)
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.step == 5
    assert all(torch.isfinite(v).all() for v in checkpoint.model.values())
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    bad = torch.load(tmp_path / "bad_batch.pt")
    batch = next(batches(two_moons(count=100), 16, 0, start=6)).x
    assert bad["step"] == 7
    assert torch.equal(bad["x"], batch)


@pytest.mark.parametrize("fused", [False, True])
def test_a_few_updates_that_are_not_finite_are_left_out(fused: bool, tmp_path: Path) -> None:
    model = fit_broken(tmp_path, 6, 8, fused=fused, max_skipped=2)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    records = read_metrics(tmp_path)
    assert [r.get("skipped") for r in records if "loss" in r] == [None, 2, 2, 2]
    state = Checkpoint.load(tmp_path)
    assert state.state["skipped"] == 2
    assert {float(s["step"]) for s in state.optimizer["state"].values()} == {18}
    (tmp_path / "more").mkdir()
    with pytest.raises(InputError, match=r"step 13\b.*max_skipped=2"):
        fit_broken(tmp_path / "more", 6, 8, 12, 13, fused=fused, max_skipped=2)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Overflowing(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.inf)

    with pytest.raises(InputError, match=r"step 4\b.*weight"):
        train(
            small_model(),
            two_moons(count=100),
            DenoisingScoreMatching(),
            Training(steps=6, batch_size=16, save_every=4),
            functools.partial(Overflowing, lr=0.0),
            tmp_path,
            progress=False,
        )
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("field", ["steps", "batch_size", "log_every", "validate_every"])
def test_training_refuses_counts_that_are_not_positive(field: str) -> None:
    with pytest.raises(InputError, match=rf"train\.{field}.*\b0\b"):
        Training(**{field: 0})


def test_a_model_without_weights_is_not_trained(tmp_path: Path) -> None:
    for model in (ScoreModel(lambda x, c: 0 * x, VPSDE()), small_model().requires_grad_(False)):
        with pytest.raises(InputError, match=r"weights.*ScoreModel"):
            fit_model(tmp_path, model, Training(steps=2))


# --- The parts of a loss -------------------------------------------------------------------------


class Thirds(DenoisingScoreMatching):
    """Has two parts that add up to its value."""

    def terms(self, model: ScoreModel, x: torch.Tensor, **options: Any) -> LossTerms:
        value = super().terms(model, x, **options).value
        return LossTerms(value, {"third": value.detach() / 3, "rest": 2 * value.detach() / 3})


class Counting(DenoisingScoreMatching):
    """Says the number of its update; one that cannot be made, and a part that comes and goes."""

    def terms(self, model: ScoreModel, x: torch.Tensor, **options: Any) -> LossTerms:
        value = super().terms(model, x, **options).value
        step = options["seeds"].start // len(x)
        parts = {"step": torch.full((len(x),), float(step))}
        parts |= {"even": torch.ones(len(x))} if step % 2 == 0 else {}
        return LossTerms(value * (float("nan") if model.training and step == 1 else 1.0), parts)


def parts_of(folder: Path, loss: Loss, **options: int) -> list[dict[str, float]]:
    make, data = functools.partial(torch.optim.Adam, lr=1e-3), two_moons(count=100)
    training = Training(steps=12, batch_size=16, log_every=4, **options)
    train(small_model(), data, loss, training, make, folder, progress=False)
    records = [r for r in read_metrics(folder) if "loss" in r]
    assert [r["step"] for r in records] == [4, 8, 12]
    return records


def test_the_means_of_the_parts_are_recorded(tmp_path: Path) -> None:
    for record in parts_of(tmp_path, Thirds(), accumulate=3):
        assert record["part/third"] == pytest.approx(record["loss"] / 3, rel=1e-5)
        assert record["part/rest"] == pytest.approx(2 * record["loss"] / 3, rel=1e-5)


def test_parts_of_updates_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    records = parts_of(tmp_path, Counting())
    assert [r["part/step"] for r in records] == [pytest.approx(5 / 3), 5.5, 9.5]
    assert [r["part/even"] for r in records] == [1, 1, 1]


def test_the_noise_error_is_a_part_and_apart_from_that_by_level(tmp_path: Path) -> None:
    for record in parts_of(tmp_path, DenoisingScoreMatching(NoiseWeighting())):
        assert record["part/noise_error"] == pytest.approx(record["loss"], rel=1e-6)
        assert not any(name.startswith("noise_error") for name in record)


# --- The error by level --------------------------------------------------------------------------


def test_levels_at_zero_snr_are_equally_spaced_in_the_bounded_variable() -> None:
    sde = RectifiedFlow()
    levels = log_snr_levels(sde, 1e-4)
    assert len(levels) == LEVELS
    b = sde.bounded(sde.time(levels))
    first = sde.bounded(torch.tensor(1e-4, dtype=torch.float64))
    expected = first * (1 - (torch.arange(LEVELS).double() + 0.5) / LEVELS)
    torch.testing.assert_close(b, expected, rtol=1e-9, atol=1e-9)


def test_errors_by_level_are_those_of_an_exact_model_at_zero_snr() -> None:
    r"""For N(0, s^2) the noise is known up to :math:`\alpha^2 s^2 / (\alpha^2 s^2 + \sigma^2)`."""
    sde, s = RectifiedFlow(), 0.7
    exact = GaussianModel(torch.zeros(64), s, sde)
    x = exact.sample(3 * 1024, seed=0)
    data = Dataset.of("normal", x.split(1024), standardise=False)
    curve = error_by_level(exact, data, 1e-4, 0)
    assert len(curve) == LEVELS
    (levels,) = level_curves([{"step": 1, **curve}]).values()
    for level, error in levels.items():
        signal = math.exp(level) * s**2
        # 85 examples of 64 dimensions: the relative error of a variance is 0.019.
        assert error == pytest.approx(signal / (1 + signal), rel=0.08)


def test_a_loss_says_where_the_levels_begin(tmp_path: Path) -> None:
    for eps in (None, 0.1):
        loss = DenoisingScoreMatching(eps=eps)
        make, data = functools.partial(torch.optim.Adam, lr=1e-3), two_moons(count=100)
        folder = tmp_path / str(eps)
        folder.mkdir()
        train(small_model(), data, loss, Training(2, 16), make, folder, progress=False)
        (curve,) = level_curves(read_metrics(folder)).values()
        first = eps or VPSDE().cutoffs.training
        ends = VPSDE().log_snr(torch.tensor([first, 1.0], dtype=torch.float64)).tolist()
        assert max(curve) == pytest.approx(ends[0] - (ends[0] - ends[1]) / 24, abs=0.01)


# --- Checkpoints ---------------------------------------------------------------------------------


def checkpoint() -> Checkpoint:
    weights = small_model().state_dict()
    return Checkpoint(RECIPE, weights, weights, step=3, seed=7)


def test_checkpoint_survives_a_round_trip(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "checkpoint.pt")
    loaded = Checkpoint.load(tmp_path)
    assert (loaded.recipe, loaded.step, loaded.seed) == (RECIPE, 3, 7)
    x, t = torch.ones(2, 2), torch.tensor(0.3)
    torch.testing.assert_close(loaded.build_model().noise(x, t), small_model().noise(x, t))
    assert not list(tmp_path.glob("*.part"))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint().save(path)
    before = path.read_bytes()
    broken = Checkpoint({"model": lambda: 0}, {}, {}, step=4, seed=0)  # cannot be written
    with pytest.raises(Exception, match="pickle"):
        broken.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint().save(path)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[:64] = bytes(b ^ 0xFF for b in content[:64])
    else:
        content = bytearray(b"" if damage == "empty" else b"hello")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pt"):
        Checkpoint.load(path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": "scoresde checkpoint", "x": Hostile()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="nothing was executed"):
        Checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = dict(small_model().state_dict())
    weights.pop(next(iter(weights)))
    with pytest.raises(InputError, match=r"weights .*Missing"):
        Checkpoint(RECIPE, weights, weights, step=0, seed=0).build_model()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "scoresde.data.files.np.load",  # passes through the package
        "scoresde.run.os.system",
        "scoresde.recipe.importlib.import_module",
        "scoresde.recipe._call",
        "scoresde.recipe.build",
        "scoresde.run.main",
        "scoresde.run.train",
        "scoresde.report.write_report",
        "scoresde.tasks.report.save_result",
        "scoresde.model.evaluating",
        "scoresdevil.Thing",
        "scoresde.no_such_thing",
        "torch.nn.init.zeros_",
        "torch.nn.Linear",
        "scoresde.",
        "",
        7,
    ],
)
def test_what_a_checkpoint_may_not_build(name: object) -> None:
    with pytest.raises(InputError, match="The checkpoint names"):
        build({"_target_": name})


def test_a_users_package_is_built_only_if_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "plugins"))
    tree = {"_target_": "my_parts.CosineSDE", "end": 1.0}
    with pytest.raises(InputError, match="allow=my_parts"):
        build(tree)
    assert build(tree, allow=["my_parts"]).end == 1.0


def test_arguments_that_a_class_does_not_take_are_a_sentence() -> None:
    with pytest.raises(InputError, match="beta_med"):
        build({"_target_": "scoresde.VPSDE", "beta_med": 1.0})


def test_a_checkpoint_cannot_reach_a_call_through_our_own_builder(tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = {
        "_target_": "scoresde.recipe._call",
        "name": "posix.mkdir",
        "arguments": {"path": str(made)},
        "allow": ["posix"],
    }
    for section in ("model", "units", "data", "likelihood"):
        file = Checkpoint({**RECIPE, section: hostile}, {}, {}, step=0, seed=0)
        with pytest.raises(InputError, match="The checkpoint names"):
            file.build(section, object)
    assert not made.exists()


@pytest.mark.parametrize(
    "recipe", [None, [], {}, {"units": "word"}, {"units": {"_target_": "scoresde.VPSDE"}}], ids=str
)
def test_a_recipe_that_was_edited_is_a_sentence(recipe: object) -> None:
    with pytest.raises(InputError, match="units"):
        Checkpoint(recipe, {}, {}, step=0, seed=0).build("units", Codec)


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = {k: v * float("nan") for k, v in small_model().state_dict().items()}
    with pytest.raises(InputError, match=r"weights .*finite"):
        Checkpoint(RECIPE, weights, weights, step=0, seed=0).build_model()


def test_a_value_of_a_part_that_an_older_checkpoint_lacks_may_be_given() -> None:
    checkpoint = Checkpoint({"likelihood": {"eps": None}}, {}, {}, step=0, seed=0)
    name = "scoresde.likelihood.cutoff.RescaledCutoff"
    changed = checkpoint.with_value("likelihood", "cutoff._target_", name)
    assert changed.recipe["likelihood"] == {"eps": None, "cutoff": {"_target_": name}}
    assert checkpoint.recipe["likelihood"] == {"eps": None}


def test_networks_are_sharded_in_the_layout_that_can_be_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Convolutions on a device are laid out channels-last, which fully_shard refuses."""
    seen: list[nn.Module] = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda m: seen.append(m) or m)
    network = UNet((1, 8, 8), 8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not all(p.is_contiguous() for p in network.parameters())
    Sharded(block=500)._shard(network)
    assert seen[-1] is network
    assert all(p.is_contiguous() for p in network.parameters())
