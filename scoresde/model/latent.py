"""A latent model of data: a codec, and a model of its latents."""

from torch import Tensor

from scoresde.codec import Codec
from scoresde.errors import InputError
from scoresde.model.base import ScoreFunction, check_model
from scoresde.recipe import describable
from scoresde.sde import SDE
from scoresde.trainable import Trainable


@describable
class LatentModel(Trainable):
    r"""A codec and a prior of its latents, :math:`p(x) = \int p(x \mid z) \, p(z) \, dz`.

    With an untrained ``VAE``, both are trained together by :class:`~scoresde.loss.LatentELBO`. The
    likelihood is :class:`~scoresde.likelihood.LatentBound`. To draw samples, sample from ``prior``
    and decode. If the codec is already trained, this class is not needed: attach the codec to the
    data set (:meth:`scoresde.data.Dataset.with_codec`) and train a plain ``ScoreModel``.

    Arguments:
        codec: The codec, such as a ``VAE``.
        prior: The model of its latents.

    Raises:
        InputError: If they are not a codec and a model, or their shapes disagree.

    Example:
        >>> import torch
        >>> from scoresde import GaussianModel, VPSDE
        >>> from scoresde.codec import Affine
        >>> prior = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> LatentModel(Affine((2,), shift=1.0), prior).decode(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """

    def __init__(self, codec: Codec, prior: ScoreFunction) -> None:
        super().__init__()
        if not isinstance(codec, Codec):
            raise InputError(f"codec must be a Codec such as a VAE, got {type(codec).__name__}.")
        check_model(prior)
        if prior.shape is not None and tuple(prior.shape) != tuple(codec.shape):
            raise InputError(
                f"prior must be a model of latents of shape {tuple(codec.shape)}, got shape "
                f"{prior.shape}."
            )
        self.codec, self.prior = codec, prior

    @property
    def process(self) -> SDE:
        """The process of the latents."""
        return self.prior.process

    def decode(self, z: Tensor) -> Tensor:
        """Returns examples for latents ``(B, *)``."""
        return self.codec.decode(z)
