"""State of a training run: everything a checkpoint needs for an exact resume."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError, OtherRunError
from scoresde.model import Trainable
from scoresde.recipe import brief, complete, updated
from scoresde.train.checkpoint import Checkpoint, tree_digest
from scoresde.train.ema import Average
from scoresde.train.engine import ModelLoss, ProcessGroup, like, own
from scoresde.train.precision import LossScale

# Options that may differ when a run is resumed: they do not affect the weights.
_FREE = {"name", "samplers", "likelihood", "class_names", "cautions"}
_FREE_OF_TRAIN = {
    "log_every",
    "validate_every",
    "save_every",
    "keep",
    "max_skipped",
    "keep_best",
    "inspect_every",
    "accumulate",
}


@dataclass
class State:
    """The mutable state of a training run.

    Arguments:
        terms: The model with its loss.
        averages: The model's averages; the first is used for evaluation.
        optimiser: The optimiser of the weights of the model and the loss.
        scale: The loss scale.
        recipe: Description of the run in its checkpoints.
        seed: The run's seed.
        folder: The run's folder.
        skipped: The number of updates skipped because they were not finite.
        best: The lowest validation loss so far.
    """

    terms: ModelLoss
    averages: list[Average]
    optimiser: torch.optim.Optimizer
    scale: LossScale
    recipe: dict[str, Any]
    seed: int
    folder: Path
    skipped: int = 0
    best: float = math.inf

    @property
    def model(self) -> Trainable:
        """The model."""
        return self.terms.model

    def checkpoint(self, step: int) -> Checkpoint:
        """Returns the checkpoint after ``step`` updates; all processes must call it.

        Raises:
            InputError: If a weight is not finite.
        """
        group = ProcessGroup.here()
        bad = sum((~own(p).isfinite()).any().float() for p in self.terms.parameters())
        if bool(group.total(torch.as_tensor(bad)) > 0):
            raise InputError(
                f"Training stopped at step {step}: a weight is not finite. Lower the "
                "learning rate (optimizer.lr), or clip the gradient (train.clip)."
            )
        generators = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.model.device)
        return Checkpoint(
            recipe=self.recipe,
            model=self.model.state_dict(),
            ema=self.averages[0].model.state_dict(),
            step=step,
            seed=self.seed,
            optimizer=self.optimiser.state_dict(),
            state={
                "averaged": self.averages[0].updates,
                "averages": [average.model.state_dict() for average in self.averages[1:]],
                "loss": self.terms.loss_state(),
                "scale": self.scale.state.tolist(),
                "skipped": self.skipped,
                "best": self.best,
                "generators": group.all(generators),
            },
        )

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Restores the state from a checkpoint, if any; returns the number of updates done.

        Raises:
            OtherRunError: If the checkpoint belongs to another training run, or lacks the state
                needed to resume.
        """
        if checkpoint is None:
            return 0
        self._compare(checkpoint)
        if not {"averages", "generators"} <= checkpoint.state.keys():
            raise OtherRunError(
                "The checkpoint in this folder is from an older release and lacks the state to "
                "resume from; set hydra.run.dir to another folder."
            )
        pattern, state = self.pattern(), checkpoint.state
        self.model.load_state_dict(like(checkpoint.model, pattern["model"]))
        self._restore_loss(state.get("loss", {}))  # missing in the first checkpoints
        self.optimiser.load_state_dict(like(checkpoint.optimizer, pattern["optimizer"]))
        for average, values in zip(
            self.averages, [checkpoint.ema, *state["averages"]], strict=True
        ):
            average.model.load_state_dict(like(values, pattern["ema"]))
            average.updates = state["averaged"]
        self.skipped, self.best = state["skipped"], state["best"]
        self.scale.state = self.scale.state.new_tensor(state["scale"])
        self._continue(state["generators"])
        return checkpoint.step

    def pattern(self) -> dict[str, Any]:
        """Returns tensors that define the sharding of a checkpoint between the processes."""
        model = self.model.state_dict()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")
        return {
            "model": model,
            "ema": model,
            "optimizer": {
                "state": {i: dict.fromkeys(moments, p) for i, p in enumerate(parameters)}
            },
            "state": {"averages": [model] * (len(self.averages) - 1)},
        }

    def _restore_loss(self, state: Mapping[str, Tensor]) -> None:
        try:
            self.terms.load_loss_state(state)
        except RuntimeError as error:
            raise OtherRunError(
                "The checkpoint in this folder does not match the weights of the loss "
                f"({brief(error)}); set hydra.run.dir to another folder."
            ) from error

    def _continue(self, generators: list[dict[str, Tensor]]) -> None:
        """Restores this process's random generators, if the checkpoint has its rank."""
        rank = ProcessGroup.here().rank
        if rank >= len(generators):
            return
        torch.set_rng_state(generators[rank]["cpu"])
        if "cuda" in generators[rank] and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(generators[rank]["cuda"], self.model.device)

    def size(self) -> int:
        """Returns the size of a checkpoint in bytes, with Adam's two moments per weight."""
        tensors: list[Tensor] = list(self.terms.state_dict().values())
        copies = 3 + len(self.averages)
        return copies * sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _compare(self, checkpoint: Checkpoint) -> None:
        try:
            there, here = (
                _flat(complete(updated(recipe))) for recipe in (checkpoint.recipe, self.recipe)
            )
        except RecursionError as error:
            raise InputError("The recipe is nested too deeply to be compared.") from error
        there["seed"], here["seed"] = checkpoint.seed, self.seed
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                raise OtherRunError(
                    f"{key} must be {there.get(key)} to resume the training run in this folder, "
                    f"got {here.get(key)}; for a new run, set hydra.run.dir to another folder."
                )


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns the leaves of a recipe by dotted name, without those that may differ."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if name in _FREE or name in {f"train.{free}" for free in _FREE_OF_TRAIN}:
            continue
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{name}.")
        else:
            leaves[name] = tree_digest({name: value}) if isinstance(value, Tensor) else value
    return leaves
