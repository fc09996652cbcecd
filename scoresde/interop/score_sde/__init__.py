r"""Checkpoints of score_sde_pytorch, the program of Song et al. 2021.

The score as a function of the network's output :math:`F`, and the label, its second input:

==================  ===============================  =========================  ==============
their SDE           label                            score                      our SDE
==================  ===============================  =========================  ==============
vpsde, subvpsde     :math:`999 t`                    :math:`-F / \sigma(t)`     VP, sub-VP
vpsde, discrete     :math:`(N - 1) t`                :math:`-F / \sigma(t)`     DiscreteVP
vesde               :math:`\sigma(t)`                :math:`F`                  VE
vesde, discrete     :math:`(N - 1)(1 - t)`, rounded  :math:`F`                  VE
==================  ===============================  =========================  ==============

With ``scale_by_sigma`` the network's output is divided by sigma: by the label itself if it is
embedded by Fourier features, otherwise by the noise level of SMLD with this index. Data are in [0,
1] if ``data.centered`` is false, and in [-1, 1] if it is true.

A discrete model equals the reference's at the times :math:`(i + 1) / N`. Between these times the
reference keeps the noise level constant, whereas ours changes smoothly. The reference's sub-VP
models are continuous, regardless of their configuration.

References:
    Song et al., https://arxiv.org/abs/2011.13456, https://github.com/yang-song/score_sde_pytorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.errors import InputError
from scoresde.interop.score_sde.configuration import describe, names, read_config
from scoresde.interop.score_sde.files import Content, read_checkpoint
from scoresde.interop.score_sde.tensors import Place, convert, places
from scoresde.model import ScoreModel
from scoresde.recipe import build

__all__ = ["Imported", "describe", "load_checkpoint", "load_recipe", "names", "read_config"]


@dataclass(frozen=True)
class Imported:
    """Contents of a checkpoint of the reference, converted to our names.

    Arguments:
        recipe: Model as plain values, for :func:`scoresde.recipe.build`.
        ema: Averaged weights, for the model's ``load_state_dict``, or None if the file has none.
        raw: Weights of the last update.
        step: Number of updates done.
        config: Configuration of the reference.
    """

    recipe: dict[str, Any]
    ema: dict[str, Tensor] | None
    raw: dict[str, Tensor]
    step: int
    config: Mapping[str, Any]


def load_checkpoint(
    path: str | Path, config: Mapping[str, Any] | str | Path, ema: bool = True
) -> ScoreModel:
    """Reads a checkpoint of the reference as a score model. Nothing in the file is executed.

    Arguments:
        path: The ``.pth`` file.
        config: The reference's configuration: a nested dictionary, the name of one of its own such
            as ``"vp/cifar10_ddpmpp_continuous"`` (see :func:`names`), or a ``.json`` or ``.yaml``
            file.
        ema: Whether to use the averaged weights, as the reference does for sampling.

    Returns:
        The model, with dropout switched off.

    Raises:
        InputError: If the file cannot be read without executing code, a tensor is missing,
            unexpected or of another shape than the configuration specifies, or a value of the
            configuration is missing or unsupported.
    """
    imported = load_recipe(path, config)
    if ema and imported.ema is None:
        raise InputError(
            f"{path} has no moving average (ema); pass ema=False for the raw weights."
        )
    model = build(imported.recipe)
    model.load_state_dict(imported.ema if ema else imported.raw)
    return model.eval()


def load_recipe(path: str | Path, config: Mapping[str, Any] | str | Path) -> Imported:
    """Reads a checkpoint of the reference as plain values and tensors with our names.

    Arguments and errors are those of :func:`load_checkpoint`.
    """
    config = read_config(config)
    recipe = describe(config)
    content = read_checkpoint(path)
    where = places(recipe["network"])
    raw = convert(content.weights, where, path)
    averaged = None if content.average is None else _averaged(content, where)
    ema = None if averaged is None else convert(averaged, where, path)
    return Imported(recipe, ema, raw, content.step, config)


def _averaged(content: Content, where: list[Place]) -> dict[str, Tensor]:
    """Returns the averaged tensors by name: a list in the order of the trained parameters."""
    trained = [place.theirs for place in where if place.trained]
    average = content.average or []
    if len(average) != len(trained):
        raise InputError(
            f"{content.path} must have {len(trained)} averaged tensors (ema.shadow_params), as "
            f"many as the configuration describes trained ones, got {len(average)}; use the "
            "configuration that the network was trained with."
        )
    return {**content.weights, **dict(zip(trained, average, strict=True))}
