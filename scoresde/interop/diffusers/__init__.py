r"""Checkpoints of the diffusers library: folders of its ``UNet2DModel`` and ``AutoencoderKL``.

The score as a function of the network's output :math:`F`, and the label, its second input:

==============  ==================  ==========================  =================================
their network   label               score                       our SDE
==============  ==================  ==========================  =================================
``positional``  the index i of the  :math:`-F / \sigma`         DiscreteVP, with the betas of the
(DDPM)          level, 0 to N - 1   (``epsilon``)               scheduler
``fourier``     :math:`\sigma(t)`   :math:`F`, which has been   VE, with the sigmas of the
(NCSN++)                            divided by :math:`\sigma`   scheduler
==============  ==================  ==========================  =================================

Data are in [0, 1] if ``center_input_sample`` is true, and in [-1, 1] if it is false.

A network with classes (``num_class_embeds``) requires the condition ``label``, one of 0 to
``num_class_embeds - 1``. The library has no row for no class, and ours stays at zero, since it was
never trained (:func:`scoresde.nn.embedding.learned_none`). If the training run used its last class
for this purpose, as is usual for guided models, pass the number of this class.

The library itself is not required. Files ``.safetensors`` are read by the small package
``safetensors``: ``pip install scoresde[interop]``.

References:
    https://github.com/huggingface/diffusers; ``google/ddpm-cifar10-32``, ``google/ncsnpp-*`` and
    others like them on https://huggingface.co.
"""

from pathlib import Path

from scoresde.codec import Autoencoder
from scoresde.errors import InputError
from scoresde.interop.diffusers.autoencoder import NAME, autoencoder_places, describe_autoencoder
from scoresde.interop.diffusers.configuration import describe, swaps_sines
from scoresde.interop.diffusers.files import Content, read_folder
from scoresde.interop.diffusers.tensors import add_none, places, renamed, swap_sines
from scoresde.interop.score_sde import Imported
from scoresde.interop.score_sde.tensors import convert
from scoresde.model import ScoreModel, Trainable
from scoresde.recipe import build

__all__ = ["load_autoencoder", "load_checkpoint", "load_recipe"]


def load_checkpoint(folder: str | Path) -> ScoreModel:
    """Reads a checkpoint of diffusers as a score model. Nothing in it is executed.

    Arguments:
        folder: Folder of a ``UNet2DModel``, with ``config.json`` and
            ``diffusion_pytorch_model.safetensors`` or ``.bin``, or the folder of a pipeline that
            contains such a folder ``unet``. The noise levels are read from the pipeline's
            ``scheduler_config.json``; without it they are the defaults of the library's
            ``DDPMScheduler`` and ``ScoreSdeVeScheduler``.

    Returns:
        The model, with dropout switched off.

    Raises:
        InputError: If a file is missing, damaged, or cannot be read without executing code in it,
            the configuration describes another kind of network or of noise, or a tensor is
            missing, unexpected or of another shape than the configuration specifies.
    """
    model = _built(load_recipe(folder))
    if not isinstance(model, ScoreModel):
        raise InputError(f"{folder} must contain a UNet2DModel, got {NAME}; use load_autoencoder.")
    return model


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """Reads an ``AutoencoderKL`` as a codec without a density. Nothing in it is executed.

    Its input is images in [-1, 1] of the configured size (``sample_size``). As the codec of a data
    set (:meth:`scoresde.data.Dataset.with_codec`), the scale of its latents is measured.

    Arguments:
        folder: Folder of an ``AutoencoderKL``, with ``config.json`` and its weights.

    Returns:
        The codec, in evaluation mode.

    Raises:
        InputError: As in :func:`load_checkpoint`.
    """
    codec = _built(load_recipe(folder))
    if not isinstance(codec, Autoencoder):
        raise InputError(
            f"{folder} must contain an {NAME}, got a UNet2DModel; use load_checkpoint."
        )
    return codec


def load_recipe(folder: str | Path) -> Imported:
    """Reads a checkpoint as plain values and tensors with our names.

    There is one set of weights, which for published models is the average.

    Arguments and errors are those of :func:`load_checkpoint`.
    """
    content = read_folder(folder)
    if content.config.get("_class_name", None) == NAME:
        return _autoencoder(content)
    recipe = describe(content.config, content.scheduler)
    state = convert(renamed(content.weights), places(recipe["network"]), content.path)
    add_none(state)
    if swaps_sines(content.config):
        swap_sines(state)
    return Imported(recipe=recipe, ema=None, raw=state, step=0, config=content.config.values)


def _autoencoder(content: Content) -> Imported:
    recipe = describe_autoencoder(content.config)
    state = convert(renamed(content.weights), autoencoder_places(recipe), content.path)
    return Imported(recipe=recipe, ema=None, raw=state, step=0, config=content.config.values)


def _built(imported: Imported) -> Trainable:
    model = build(imported.recipe)
    model.load_state_dict(imported.raw)
    return model.eval()
