r"""Averages of any length, chosen after the training.

A training run maintains two power-function averages (:class:`~scoresde.train.ema.PowerEMA`) and
stores them at intervals. Each stored average is an integral of the weights :math:`\theta(\tau)`
with a known profile. The average of another length has a known profile too. The combination of
stored profiles nearest to it in the least-squares sense,

.. math:: \min_w \int \Big( \sum_i w_i \, p_i(\tau) - p(\tau) \Big)^2 d\tau,
          \qquad A w = b, \quad A_{ij} = \langle p_i, p_j \rangle, \; b_i = \langle p_i, p \rangle,

is applied to the stored weights, under :math:`\sum_i w_i = 1`, so weights that do not change in
training are preserved. For :math:`p_i(\tau) = (\gamma_i + 1) \tau^{\gamma_i} /
n_i^{\gamma_i + 1}` on :math:`[0, n_i]` and :math:`m = \min(n_i, n_j)`,

.. math:: \langle p_i, p_j \rangle = \frac{(\gamma_i + 1) (\gamma_j + 1)}{\gamma_i + \gamma_j + 1}
          \left( \frac{m}{n_i} \right)^{\gamma_i} \left( \frac{m}{n_j} \right)^{\gamma_j}
          \frac{m}{n_i n_j} .

References:
    Karras et al. 2024, https://arxiv.org/abs/2312.02696 (section 3.2 and appendix C).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from scoresde.errors import InputError
from scoresde.train.checkpoint import Checkpoint
from scoresde.train.ema import PowerEMA, power_of_length
from scoresde.train.engine import ProcessGroup, whole
from scoresde.train.state import State

FOLDER = "snapshots"


@dataclass(frozen=True)
class Profile:
    """The profile of a stored average.

    Arguments:
        step: The number of updates that it spans, positive.
        length: Its length, as a share of these updates.
    """

    step: int
    length: float

    @property
    def power(self) -> float:
        """The power of the profile."""
        return power_of_length(self.length)

    def dot(self, other: "Profile") -> float:
        """Returns the integral of the product of two profiles."""
        a, b, m = self.power, other.power, min(self.step, other.step)
        shared = (m / self.step) ** a * (m / other.step) ** b
        return (a + 1) * (b + 1) / (a + b + 1) * shared * m / (self.step * other.step)


def weights_of(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Returns the coefficient of each stored average in the wanted average."""
    n = len(stored)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = [[a.dot(b) for b in stored] for a in stored]
    system[:n, :n] *= wanted.step  # of order 1, like the border
    system[n, n] = 0
    right = np.array([*(a.dot(wanted) * wanted.step for a in stored), 1.0])
    return np.linalg.lstsq(system, right, rcond=1e-14)[0][:n]


@dataclass(frozen=True)
class Snapshots:
    """The stored averages of a training run.

    Arguments:
        paths: The files of the averages, by profile.
    """

    paths: dict[Profile, Path]

    @staticmethod
    def of(run: Path) -> "Snapshots":
        """Finds the averages in a run's folder.

        Raises:
            InputError: If there are no stored averages.
        """
        found = {}
        for path in sorted((run / FOLDER).glob("*.pt")):
            name = re.fullmatch(r"(\d+)_(0\.\d+)", path.stem)
            if name:
                found[Profile(int(name[1]), float(name[2]))] = path
        if not found:
            raise InputError(
                f"{run} contains no stored averages; to choose their length after training, set "
                "train.snapshots=32 for the training run."
            )
        return Snapshots(found)

    @property
    def last(self) -> int:
        """The last step at which averages were stored."""
        return max(profile.step for profile in self.paths)

    def average(self, length: float, step: int | None = None) -> Checkpoint:
        """Returns a checkpoint with an average of any length.

        Arguments:
            length: The length, as a share of the training.
            step: The number of updates that it spans. If None, up to the last stored averages.

        Raises:
            InputError: If the length is out of range, or the files do not belong together.
        """
        wanted = Profile(self.last if step is None else step, length)
        stored = [profile for profile in self.paths if profile.step <= wanted.step]
        if not stored:
            first = min(profile.step for profile in self.paths)
            raise InputError(
                f"step must be at least {first}, the step of the first stored average, got {step}."
            )
        total: dict[str, Tensor] = {}
        for weight, profile in zip(weights_of(stored, wanted), stored, strict=True):
            part = Checkpoint.load(self.paths[profile])
            if total and part.ema.keys() != total.keys():
                raise InputError(
                    f"{self.paths[profile]} belongs to a different training run than the other "
                    "averages."
                )
            for name, value in part.ema.items():
                total[name] = total.get(name, 0) + weight * value.double()
        # Counts are not averaged; the last ones are used.
        ema = {k: total[k].to(v) if v.is_floating_point() else v for k, v in part.ema.items()}
        return replace(part, step=wanted.step, ema=ema)


def save_snapshot(state: State, step: int) -> None:
    """Stores the power-function averages of a training run; all processes must call it."""
    for average in state.averages[1:]:
        assert isinstance(average, PowerEMA)
        weights = whole(average.model.state_dict())
        if ProcessGroup.here().first:
            (state.folder / FOLDER).mkdir(exist_ok=True)
            path = state.folder / FOLDER / f"{step:08d}_{average.length:.4f}.pt"
            Checkpoint(state.recipe, {}, weights, step, state.seed).save(path)
