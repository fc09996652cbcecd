"""Makes tests/fixtures/old: it ran at commit 073b527, and documents how.

    python -m tests.make_old_checkpoints FOLDER

Later code cannot make these files, which is the point of them: it only has to read them.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import scoresde.run
import scoresde.tasks.parts
import scoresde.train.loop
from scoresde import plots
from scoresde.train import Checkpoint
from tests.old_checkpoints import RESUMED, applied, command, table
from tests.recorded import save

ALONE = "~sampler@samplers.euler_maruyama ~sampler@samplers.predictor_corrector"
ALONE = f"{ALONE} ~sampler@samplers.probability_flow ~tracker@trackers.tensorboard"
QUICK = (
    "device=cpu progress=false baselines=false count=2 examples=2 inspect.count=2 threads=1 "
    "train.steps=4 train.batch_size=16 train.rate.warmup=1 train.log_every=2 "
    "train.validate_every=4 train.keep=1 +train.keep_best=false train.clip=1.0"
)
SMALL = "network=mlp network.width=8 network.depth=1"
SGD = "optimizer._target_=torch.optim.SGD optimizer.lr=0.5"
PLANE = "data=two_moons data.count=100"
EXACT = "likelihood.probes=exact likelihood.rtol=1e-3 likelihood.atol=1e-3"
LOOSE = "likelihood.rtol=1e-3 likelihood.atol=1e-3"


def embedding(kind, **more):
    values = ",".join(f"{k}:{v}" for k, v in {"width": 4, **more}.items())
    return f"+network.embedding={{_target_:scoresde.nn.{kind},{values}}}"


FOURIER = embedding("FourierEmbedding")
COUNTING = embedding("PositionalEmbedding")
LOGARITHMIC = embedding("FourierEmbedding", scale=1.0, log="true")


def sampler(kind, more="", name=None):
    """Adds a sampler; of ``more``, the values ``key=value`` are the sampler's."""
    place = f"samplers.{name or 'my_' + kind}"
    words = [f"+sampler@{place}={kind}"]
    for text in more.split():
        if text.startswith("grid@"):
            words.append(f"grid@{place}.{text.removeprefix('grid@')}")
        elif text.startswith("+"):
            words.append(f"+{place}.{text[1:]}")
        else:
            words.append(f"{place}.{text}")
    return " ".join(words)


def hutchinson(distribution, count=2):
    return (
        f"likelihood.probes={{_target_:scoresde.divergence.Hutchinson,count:{count},"
        f"distribution:{{_target_:scoresde.divergence.{distribution}}}}}"
    )


def probes(kind, **values):
    given = "".join(f",{k}:{v}" for k, v in values.items())
    return f"likelihood.probes={{_target_:scoresde.divergence.{kind}{given}}}"


VE, SUBVP, CHAIN, COSINE = "sde=ve", "sde=subvp", "sde=ddpm", "sde=cosine"
FLOW = "rtol=1e-3 atol=1e-3"
# What each checkpoint is trained with, beside what is above.
RECIPES = {
    "noise": [
        "parametrisation=noise label=noise_level loss=noise times@loss.times=low_discrepancy",
        FOURIER,
        EXACT,
        sampler("ddim", "steps=4 grid@grid=uniform eta=0.3"),
        sampler("euler", "steps=4 grid@grid=quadratic"),
    ],
    "data": [
        "parametrisation=data label=scaled_time label.scale=100.0",
        "loss=noise times@loss.times=uniform",
        "likelihood=published likelihood.eps=1e-3",
        COUNTING,
        SUBVP,
        sampler("heun", "steps=6 grid@grid=karras churn=2.0"),
        sampler("restart", "sampler.steps=6 grid@sampler.grid=karras"),
    ],
    "v": [
        "parametrisation=v label=sigma loss=likelihood times@loss.times=importance",
        LOGARITHMIC,
        EXACT,
        VE,
        sampler("dpm_solver", "steps=3 order=3 grid@grid=log_snr"),
        sampler("dpm_solver_pp", "steps=5 order=3 grid@grid=cosine"),
    ],
    "score": [
        "parametrisation=score label=chain_index loss=ddpm likelihood=bound likelihood.draws=4",
        COUNTING,
        CHAIN,
        sampler("ddpm", "steps=6"),
        sampler("ancestral", "steps=4 +along_path=true"),
        sampler("dpm_solver_pp", "steps=4 as_coded=true lower_order_below=0"),
    ],
    "preconditioned": [
        "parametrisation=preconditioned label=reversed_index label.scales=100 loss=smld",
        f"likelihood=colours likelihood.probes.spacing=1 {LOOSE}",
        COUNTING,
        VE,
        sampler("annealed_langevin", "steps=3 langevin.steps=3"),
        sampler("reference", "steps=8"),
    ],
    "cosine_chain": [
        "label=chain_index loss=noise times@loss.times=chain parametrisation=v",
        COUNTING,
        EXACT,
        COSINE,
        sampler("deis", "steps=5 grid@grid=quadratic"),
        sampler("ipndm", "steps=5"),
        sampler("ipndm", "steps=5 order=3 single_steps=true", "single_steps"),
    ],
    "edm": [
        "loss=edm times@loss.times=log_normal optimizer=adam optimizer.lr=0.05",
        FOURIER,
        EXACT,
        sampler("unipc", "steps=5 order=3 grid@grid=log_snr"),
        sampler("dpm_solver_pp_sde", "steps=5"),
    ],
    "published_loss": [
        "parametrisation=noise parametrisation.sigma_data=null label=scaled_time loss=published",
        "optimizer=adam_published optimizer.lr=0.05",
        COUNTING,
        hutchinson("Rademacher"),
        LOOSE,
        sampler("seeds", "steps=4"),
        sampler("annealed_langevin", "steps=2 langevin.steps=2 grid@grid=karras"),
        sampler("predictor_corrector", "steps=4"),
        sampler("euler_maruyama", "steps=4"),
    ],
    "folded": [
        "loss.times._target_=scoresde.bound.Folded",
        "loss.times.times._target_=scoresde.times.ImportanceTimes",
        FOURIER,
        hutchinson("Gaussian"),
        LOOSE,
        "likelihood.cutoff._target_=scoresde.cutoff.RescaledCutoff",
        sampler("gotta_go_fast", "rtol=0.1"),
        sampler("torchsde", "steps=5"),
    ],
    "levels": [
        "parametrisation=noise loss=noise ~loss.times.times",
        "loss.times._target_=scoresde.times.LevelTimes +loss.times.levels=10",
        FOURIER,
        VE,
        hutchinson("Sphere"),
        LOOSE,
        "likelihood.cutoff._target_=scoresde.cutoff.VariationalCutoff",
        sampler("probability_flow", FLOW),
    ],
    "chain_times": [
        "loss=noise label=chain_index parametrisation=preconditioned ~loss.times.times",
        "loss.times._target_=scoresde.times.ChainTimes",
        COUNTING,
        CHAIN,
        hutchinson("Orthogonal"),
        LOOSE,
        "likelihood.cutoff._target_=scoresde.cutoff.VariationalCutoff",
        "+likelihood.cutoff.variance=0.8",
        sampler("ddim", "steps=5 grid@grid=cosine"),
    ],
    "importance_alone": [
        "loss=noise ~loss.times.times loss.times._target_=scoresde.times.ImportanceTimes",
        "loss.eps=1e-4 loss.reduce_mean=false",
        FOURIER,
        SUBVP,
        EXACT,
        "likelihood.clock._target_=scoresde.flow.TimeClock likelihood.method=tsit5",
        sampler("probability_flow", FLOW + " method=tsit5", "tsit5"),
        sampler(
            "probability_flow",
            FLOW + " +clock={_target_:scoresde.flow.TimeClock} +probes=exact",
            "time_clock",
        ),
    ],
    "bosh3": [
        "loss=edm data=checkerboard data.count=100",
        FOURIER,
        probes("ExactTrace", chunk=2, forward="true"),
        LOOSE,
        "likelihood.method=bosh3 +likelihood.clock.scale=1.0",
        sampler(
            "predictor_corrector",
            "steps=4 predictor={_target_:scoresde.sample.EulerMaruyamaPredictor} "
            "corrector={_target_:scoresde.sample.AnnealedLangevin,snr:0.2,steps:2}",
        ),
        sampler("dpm_solver_pp_sde", "steps=5 order=3 tau=0.5 grid@grid=karras +along_path=true"),
    ],
    "dopri8": [
        "loss=likelihood data=gaussian_ring data.count=100 parametrisation=data",
        FOURIER,
        EXACT,
        "likelihood.method=dopri8 likelihood.eps=1e-3",
        sampler(
            "ddim",
            "steps=3 eps=0.001 grid@grid=explicit grid.times=[1.0,0.5,0.2,0.001]",
            "explicit",
        ),
        sampler("euler", "steps=4 grid@grid=log_snr temperature=0.9 final_denoise=true"),
    ],
    "target": [
        "data=spirals data.count=100 loss=edm loss.weighting.sigma_data=0.7",
        FOURIER,
        hutchinson("Rademacher"),
        LOOSE,
        "likelihood.target_error=0.2 +likelihood.max_sets=30 likelihood.strict=false",
        sampler("heun", "steps=4 grid@grid=uniform"),
        sampler("unipc", "steps=4 bh=1 single_steps=true"),
    ],
    "array": [
        "data=array data.path=values.npy loss=noise",
        FOURIER,
        EXACT,
        sampler("deis", "steps=4 variable={_target_:scoresde.sample.HalfLogSNR}", "by_snr"),
        sampler("deis", "steps=4 variable={_target_:scoresde.sample.NoiseLevel}", "by_noise"),
    ],
    "levels_array": [
        "data=array data.path=levels.npz data.key=x data.levels=8 loss=edm",
        FOURIER,
        LOOSE,
        sampler("dpm_solver", "steps=4 order=1"),
    ],
    "folder": [
        "data=folder data.path=pictures data.size=4 data.mode=L data.flip=true "
        "data.dequantise=false data.centred=false data.fractions=[0.5,0.25,0.25]",
        FOURIER,
        LOOSE,
        sampler("ipndm", "steps=4 order=2"),
    ],
    "digits": [
        "data=digits loss=noise parametrisation=noise",
        FOURIER,
        f"likelihood=colours {LOOSE}",
        sampler("unipc", "steps=4"),
        sampler("predictor_corrector", "steps=3 corrector.snr=0.2"),
    ],
    "digits_ve": [
        "data=digits loss=edm parametrisation=preconditioned",
        FOURIER,
        VE,
        LOOSE,
        "likelihood.probes=1",
        sampler("probability_flow", FLOW),
        sampler("reference", "steps=6 corrector=null"),
    ],
    "digits_unet": [
        "data=digits network=unet network.width=4 network.multipliers=[1] network.attention=[]",
        FOURIER,
        SUBVP,
        "likelihood=bound likelihood.draws=2",
        sampler("ddim", "steps=3"),
    ],
    "digits_bound_times": [
        "data=digits loss=noise likelihood=bound likelihood.draws=3 likelihood.replicates=1",
        "+likelihood.times={_target_:scoresde.bound.Folded,"
        "times:{_target_:scoresde.times.UniformTimes}}",
        FOURIER,
        sampler("gotta_go_fast", "rtol=0.2 atol=0.05"),
    ],
    "augmented": [
        "data=digits loss=edm +network.conditions={augment:9}",
        "train.augment={_target_:scoresde.data.GeometricAugmentation,probability:0.3}",
        FOURIER,
        f"likelihood.probes=1 {LOOSE}",
        sampler("seeds", "steps=2 tau=0.5"),
    ],
    "snapshots": [
        "train.snapshots=2 train.ema=0.9 train.accumulate=2 loss=noise",
        FOURIER,
        SUBVP,
        EXACT,
        sampler(
            "torchsde",
            "steps=6 method=srk motion._target_=scoresde.solvers.Path +motion.depth=12",
            "srk",
        ),
        sampler(
            "torchsde",
            "steps=6 adaptive=true rtol=0.1 atol=0.1 motion._target_=scoresde.solvers.Path",
            "adaptive",
        ),
    ],
    "restart_two": [
        "loss=edm parametrisation=score label=sigma",
        LOGARITHMIC,
        EXACT,
        sampler(
            "restart",
            "sampler.steps=8 loops=[{_target_:scoresde.sample.Loop,low:0.3,high:1.0,steps:2,"
            "repeats:1},{_target_:scoresde.sample.Loop,low:0.06,high:0.3,steps:2,repeats:2}]",
        ),
        sampler(
            "reference",
            "steps=24 predictor._target_=scoresde.sample.AncestralPredictor "
            "+predictor.variance=1.0 "
            "corrector.rule._target_=scoresde.sample.ShrunkNorm "
            "+corrector.rule.pseudo_dimensions=64.0",
        ),
    ],
    "sigma_cosine": [
        "loss=published label=sigma parametrisation=data",
        LOGARITHMIC,
        COSINE,
        EXACT,
        sampler("ddim", "steps=4 eta=1.0 grid@grid=log_snr"),
        sampler("seeds", "steps=3 grid@grid=uniform"),
    ],
}


def program(arguments, cwd, code=0):
    """Runs the program in this process, as from a folder."""
    GlobalHydra.instance().clear()
    out, before = io.StringIO(), (list(sys.path), sys.argv)
    sys.argv, left = ["scoresde", *arguments], 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        try:
            scoresde.run.main()
        except SystemExit as exit_:
            left = exit_.code if isinstance(exit_.code, int) else 1
        finally:
            sys.path[:], sys.argv = before
            logging.shutdown()
    if left != code:
        raise RuntimeError(f"{arguments}: code {left}\n{out.getvalue()}")


def data_files(folder):
    generator = np.random.default_rng(0)
    np.save(folder / "values.npy", generator.normal(1, 2, (40, 3)).astype(np.float32))
    np.savez_compressed(folder / "levels.npz", x=generator.integers(0, 8, (40, 5), np.uint8))
    (folder / "pictures").mkdir()
    for i in range(12):
        pixels = generator.integers(0, 256, (4, 4), np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{i}.png")


def checkpoint(name, folder, work):
    words = " ".join([QUICK, SMALL, PLANE, SGD, ALONE, *RECIPES[name]]).split()
    last = {}
    for word in words:  # of two values for one key, the later counts
        key = word.partition("=")[0]
        last.pop(key, None)
        last[key] = word
    if any(w.startswith("optimizer=") for w in last.values()):
        last.pop("optimizer._target_", None)
    if last["data"] != "data=two_moons" and "count" not in " ".join(RECIPES[name]):
        last.pop("data.count")
    if last["network"] != "network=mlp":
        last.pop("network.depth")
    program([*last.values(), f"name={name}", f"hydra.run.dir={work / name}"], folder)
    shutil.copy(work / name / "checkpoint.pt", folder / f"{name}.pt")


# --- Runs that were interrupted ------------------------------------------------------------------


def interrupted(arguments, folder, patch, code):
    """Runs the program in a process of its own, which may be killed; its data stay as they are."""
    pid = os.fork()
    if pid == 0:
        try:
            patch()
            program(arguments, folder, code)
        except BaseException:
            logging.exception("unexpected")
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != (0 if code else 9):
        raise RuntimeError(f"{arguments}: {status}")


def stop_after(updates, act):
    """Has something done within the update that comes after so many."""
    plain = scoresde.train.loop.Update.__call__

    def update(self, x, cond, step, size):
        if step == updates - 1:
            act()
        return plain(self, x, cond, step, size)

    scoresde.train.loop.Update.__call__ = update


def kill_after(pieces):
    """Kills the process when so many pieces of an evaluation are kept."""
    plain = scoresde.tasks.parts.Parts.save
    count = 0

    def keep(self, piece, columns):
        nonlocal count
        plain(self, piece, columns)
        count += 1
        if count == pieces:
            os._exit(9)

    scoresde.tasks.parts.Parts.save = keep


def unfinished(folder):
    """Leaves interrupted runs, and what they would have ended with."""
    ends = {}
    for name, task in RESUMED.items():
        place, whole = folder / name, folder / f"whole_{name}"
        program([*command(name), f"hydra.run.dir={whole.name}"], folder)
        if task == "train":
            there = Checkpoint.load(whole)
            for kind, values in (("ema", there.ema), ("raw", there.model)):
                ends |= {f"exact/{name}/{kind}/{key}": value for key, value in values.items()}
        else:
            ends |= table(name, whole)
        shutil.rmtree(whole)
        if name == "unfinished":
            code = scoresde.run.STOPPED
            patch = lambda: stop_after(6, lambda: signal.raise_signal(signal.SIGTERM))  # noqa: E731
        elif task == "train":
            code, patch = 0, lambda: stop_after(9, lambda: os._exit(9))
        else:
            code, patch = 0, lambda: kill_after(2)
        interrupted([*command(name), f"hydra.run.dir={name}"], folder, patch, code)
        for path in place.rglob("*"):
            # Paths of the machine that made them.
            if path.suffix in (".yaml", ".json", ".log", ".jsonl"):
                text = path.read_text().replace(str(folder), "/old")
                path.write_text(text.replace(str(Path(scoresde.run.__file__).parents[1]), "/code"))
        # The second name of the same file, which the test gives back.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        for path in [*place.rglob("events.out*"), *place.rglob(".lock"), *place.glob("*.log")]:
            path.unlink()
    save(folder / "ends.npz", ends)


def main(folder):
    torch.set_num_threads(1)
    work = folder.with_name(folder.name + "_work")
    for path in (folder, work):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    def blank(figure, path):
        Image.new("RGB", (8, 8)).save(plots._folder(path), format="png")
        return Path(path)

    plots._save = blank
    os.environ["XDG_CACHE_HOME"] = str(work)
    # A copy that is installed elsewhere would bring its own conf/.
    assert scoresde.run.CONF == "../conf", scoresde.run.CONF
    data_files(folder)
    for name in RECIPES:
        checkpoint(name, folder, work)
    unfinished(folder)
    expected = {}
    for path in sorted(folder.glob("*.pt")):
        expected |= applied(path)
    save(folder / "expected.npz", expected)
    shutil.rmtree(work)
    print(json.dumps({p.name: p.stat().st_size for p in sorted(folder.iterdir())}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
