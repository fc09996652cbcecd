"""Conversion of checkpoints of other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scoresde.codec import Affine
from scoresde.errors import InputError
from scoresde.interop import diffusers, score_sde
from scoresde.interop.score_sde import Imported
from scoresde.train import Checkpoint
from scoresde.train.checkpoint import NAME

_LEVELS = 256
_SETS = {"CIFAR10": "scoresde.data.cifar10"}


def read_foreign(path: str | Path, reference: Mapping[str, Any] | str | None) -> Imported:
    """Reads a checkpoint of another program.

    Arguments:
        path: A ``.pth`` file of score_sde_pytorch, or a folder of diffusers.
        reference: The score_sde_pytorch configuration: the name of one of its own, a ``.json`` or
            ``.yaml`` file, or its values. None for a folder of diffusers.

    Raises:
        InputError: If it cannot be read, or does not match its configuration.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"checkpoint must be an existing file or folder, got {path}.")
    if (place / NAME).is_file() or place.name == NAME:
        raise InputError(
            f"checkpoint must be of another program for task=import, got {path}, a checkpoint of "
            f"scoresde; use it as it is, such as task=sample checkpoint={path}."
        )
    if place.is_dir():
        if reference is not None:
            raise InputError(
                f"reference has no effect on {path}, a folder of diffusers with its own "
                "configuration; remove it."
            )
        return diffusers.load_recipe(path)
    if reference is None:
        names = ", ".join(score_sde.names()[:2])
        raise InputError(
            f"task=import requires the configuration of {path}; use reference=NAME (such as "
            f"{names}) or reference=FILE.json."
        )
    return score_sde.load_recipe(path, reference)


def import_checkpoint(
    imported: Imported, folder: Path, parts: Mapping[str, Any], data: Mapping[str, Any] | None
) -> Checkpoint:
    """Writes an imported model as ``checkpoint.pt``, which every task supports.

    Arguments:
        imported: The imported model.
        folder: Output folder.
        parts: Further sections of the recipe, such as the likelihood, as plain values.
        data: The data as plain values. If None, the data named by the checkpoint, if available.

    Returns:
        The checkpoint.

    Raises:
        InputError: If its weights do not match its model, or are not finite.
    """
    shape, centred = _taken(imported.recipe)
    codec = Affine.of_levels(shape, _LEVELS, centred)
    data = data or _named_data(imported.config, centred)
    recipe = {
        "model": imported.recipe,
        "units": codec.describe(),
        **({"data": dict(data)} if data else {}),
        **parts,
    }
    average = imported.raw if imported.ema is None else imported.ema
    checkpoint = Checkpoint(recipe, imported.raw, average, imported.step, seed=0)
    for choice in (True, False):
        checkpoint.build_model(average=choice)
    checkpoint.save(folder / NAME)
    return checkpoint


def _taken(recipe: Mapping[str, Any]) -> tuple[Sequence[int], bool]:
    """Returns the shape of a model's images, and whether they are in [-1, 1]."""
    if "encoder" in recipe:  # an autoencoder
        return recipe["encoder"]["network"]["shape"], True
    network = _network(recipe)
    return network["shape"], not network["centre"]


def _network(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the description of the U-Net, which may be wrapped."""
    network = recipe["network"]
    while "shape" not in network:
        network = network["network"]
    return network


def _named_data(config: Mapping[str, Any], centred: bool) -> dict[str, Any] | None:
    data = config.get("data")
    name = data.get("dataset") if isinstance(data, Mapping) else None
    if name not in _SETS or (data or {}).get("image_size") != 32:
        return None
    return {"_target_": _SETS[name], "centred": centred}
