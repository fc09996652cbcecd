"""Noise design for a data set, as text and as a recipe."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.loss import NoiseDesign

NAME = "designed"
CONF = "conf"  # subfolder of a run, for --config-dir


def summary(design: NoiseDesign, shape: tuple[int, ...]) -> str:
    """Returns the design in a few lines."""
    together = design.levels * design.steps
    lines = [
        f"{math.prod(shape)} dimensions, noise levels in model units",
        f"sigma_1 (largest)     {design.sigma_max:.4g}",
        f"sigma_L (smallest)    {design.sigma_min:.4g}",
        f"levels L              {design.levels}, each 1/{design.ratio:.4f} of the one before",
        f"Langevin steps T      {design.steps} at each level, {together} in all",
        f"step size epsilon     {design.step_size:.3g} (variance at a level: "
        f"{design.variance_ratio:.3f} of its own)",
        f"average of weights    {design.ema}",
    ]
    return "\n".join(lines)


def recipe(
    design: NoiseDesign, shape: tuple[int, ...], choice: str, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a recipe that trains with the noise of a design and samples by Langevin dynamics.

    Arguments:
        design: The design.
        shape: The shape of one example in model units.
        choice: The option of the group ``data``.
        data: Its values.
    """
    sampler = design.langevin()
    corrector: Any = sampler.langevin
    values = dict(data)
    if isinstance(values.get("path"), str):  # makes the recipe independent of the current folder
        values["path"] = str(Path(values["path"]).expanduser().resolve())
    return {
        "defaults": [
            {"/sampler@samplers.annealed_langevin": "annealed_langevin"},
            {"override /data": choice},
            {"override /sde": "ve"},
            {"override /network": "mlp" if len(shape) == 1 else "unet"},
            {"override /parametrisation": "noise"},
            {"override /loss": "smld"},
            "_self_",
        ],
        "name": NAME,
        "data": values,
        "sde": {"sigma_min": design.sigma_min, "sigma_max": design.sigma_max},
        "loss": {"times": {"levels": design.levels}},
        "train": {"ema": design.ema},
        "samplers": {
            "annealed_langevin": {
                "steps": sampler.steps,
                "eps": sampler.eps,
                "langevin": {"snr": corrector.snr, "steps": corrector.steps},
            }
        },
    }


def save(text: str, folder: Path) -> Path:
    """Writes a recipe where ``--config-dir FOLDER/conf +experiment=designed`` finds it."""
    path = folder / CONF / "experiment" / f"{NAME}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
