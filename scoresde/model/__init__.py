r"""Models: the score, the noise and the denoised data, three equivalent forms of one function.

At time :math:`t` an example is :math:`x = \alpha x_0 + \sigma z`. The expected noise, the expected
data and the gradient of the log-density determine each other (Tweedie's formula):

.. math::
    \hat z(x, t) = E[z \mid x], \qquad
    D(x, t) = E[x_0 \mid x] = \frac{x - \sigma \hat z}{\alpha}, \qquad
    \nabla_x \log p_t(x) = -\frac{\hat z}{\sigma} .

A :class:`ScoreFunction` offers the three. A :class:`ScoreModel` is a network plus an SDE that
learns them. :class:`GaussianModel` and :class:`GaussianMixtureModel` have them in closed form, so
everything else can be compared with exact values.

References:
    Efron, *Tweedie's formula and selection bias*, 2011.
    Song et al., https://arxiv.org/abs/2011.13456.
    Karras et al., *Elucidating the design space of diffusion-based generative models*, 2022,
    https://arxiv.org/abs/2206.00364 (section 5 and table 1).
    Salimans and Ho, *Progressive distillation*, 2022, https://arxiv.org/abs/2202.00512 (v).
"""

from scoresde.model.base import (
    Conditioned,
    Model,
    ScoreFunction,
    Trainable,
    check_model,
    evaluating,
)
from scoresde.model.bridge import (
    BridgeModel,
    DataOutput,
    Output,
    ResidualOutput,
    adds_nothing,
    bridge_velocity,
)
from scoresde.model.classes import classes_of
from scoresde.model.classifier import Classifier
from scoresde.model.full_mixture import FullMixtureModel
from scoresde.model.gaussian import GaussianModel
from scoresde.model.gaussian_bridge import GaussianBridge
from scoresde.model.interpolant import InterpolantModel
from scoresde.model.latent import LatentModel
from scoresde.model.mixture import GaussianMixtureModel
from scoresde.model.noise_label import (
    ChainIndex,
    NoiseLabel,
    NoiseLevel,
    ReversedIndex,
    ScaledTime,
    Sigma,
)
from scoresde.model.parametrisation import (
    DataParametrisation,
    NoiseParametrisation,
    Parametrisation,
    Preconditioned,
    ScoreParametrisation,
    VelocityParametrisation,
    VParametrisation,
)
from scoresde.model.score_model import Prediction, ScoreModel
from scoresde.recipe import renamed

__all__ = [
    "BridgeModel",
    "ChainIndex",
    "Classifier",
    "Conditioned",
    "DataOutput",
    "DataParametrisation",
    "FullMixtureModel",
    "GaussianBridge",
    "GaussianMixtureModel",
    "GaussianModel",
    "InterpolantModel",
    "LatentModel",
    "Model",
    "NoiseLabel",
    "NoiseLevel",
    "NoiseParametrisation",
    "Output",
    "Parametrisation",
    "Preconditioned",
    "Prediction",
    "ResidualOutput",
    "ReversedIndex",
    "ScaledTime",
    "ScoreFunction",
    "ScoreModel",
    "ScoreParametrisation",
    "Sigma",
    "Trainable",
    "VParametrisation",
    "VelocityParametrisation",
    "adds_nothing",
    "bridge_velocity",
    "check_model",
    "classes_of",
    "evaluating",
]

__getattr__ = renamed(__name__)
