"""The state of a training: what a checkpoint has to hold so that nothing is lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model import ScoreFunction
from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import EMA

# What a training may change while it is interrupted: it does not change the weights.
_FREE = {"name", "samplers", "likelihood"}
_FREE_OF_TRAIN = {
    "log_every",
    "validate_every",
    "save_every",
    "keep",
    "tensorboard",
    "max_skipped",
}


@dataclass
class State:
    """Everything that changes in a training.

    Arguments:
        model: The model.
        ema: Its average.
        optimiser: The optimiser of its weights.
        recipe: What the checkpoints say of the run.
        seed: The run's seed.
        folder: The run's folder.
        skipped: The updates left out because they were not finite.
    """

    model: ScoreFunction
    ema: EMA
    optimiser: torch.optim.Optimizer
    recipe: dict[str, Any]
    seed: int
    folder: Path
    skipped: int = 0

    def checkpoint(self, step: int) -> Checkpoint:
        """Returns the state after so many updates.

        Raises:
            InputError: If a weight is not finite, which no checkpoint is to hold.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise InputError(
                f"Training stopped at step {step}: a weight is not finite any more. Lower the "
                "learning rate (optimizer.lr), or clip the gradient (train.clip)."
            )
        generators = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.model.device)
        return Checkpoint(
            recipe=self.recipe,
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            step=step,
            seed=self.seed,
            optimizer=self.optimiser.state_dict(),
            state={
                "averaged": self.ema.updates,
                "skipped": self.skipped,
                "generators": generators,
            },
        )

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Takes the state of a checkpoint, if there is one; returns the updates done.

        Raises:
            InputError: If it is that of another training, or does not say enough to go on.
        """
        if checkpoint is None:
            return 0
        self._compare(checkpoint)
        if not checkpoint.state:
            raise InputError(
                "The checkpoint in this folder is of an older release and does not say how to go "
                "on; choose another folder by hydra.run.dir=FOLDER."
            )
        self.model.load_state_dict(checkpoint.model)
        self.ema.model.load_state_dict(checkpoint.ema)
        self.optimiser.load_state_dict(checkpoint.optimizer)
        self.ema.updates = checkpoint.state["averaged"]
        self.skipped = checkpoint.state["skipped"]
        generators = checkpoint.state["generators"]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and self.model.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], self.model.device)
        return checkpoint.step

    def size(self) -> int:
        """Returns how many bytes a checkpoint takes, with two numbers of Adam for each weight."""
        tensors: list[Tensor] = list(self.model.state_dict().values())
        return 4 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _compare(self, checkpoint: Checkpoint) -> None:
        there, here = _flat(checkpoint.recipe), _flat(self.recipe)
        there["seed"], here["seed"] = checkpoint.seed, self.seed
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                raise InputError(
                    f"This folder holds a training with {key}={there.get(key)}, and this one has "
                    f"{here.get(key)}; choose another folder by hydra.run.dir=FOLDER."
                )


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns the leaves of a recipe by their dotted names, without those that may change."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if name in _FREE or name in {f"train.{free}" for free in _FREE_OF_TRAIN}:
            continue
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves
