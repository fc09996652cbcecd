r"""Denoising score matching across noise levels.

For data :math:`x_0`, a time :math:`t` and noise :math:`z`, the predicted noise of a model at
:math:`x_t = \alpha x_0 + \sigma z` is compared with the true noise,

.. math:: L = w(t) \, \frac{1}{D} \lVert \hat z(x_t, t) - z \rVert^2 .

For any positive weight, it is minimised over all functions by :math:`\hat z = E[z \mid x_t]`, that
is by the exact score.

======================  =========================================  ================================
weighting               w(t)                                       equals
======================  =========================================  ================================
noise                   1                                          "simple" loss of DDPM
likelihood              :math:`g^2 / \sigma^2`                     twice the integrand of the bound
EDM                     :math:`1 + \sigma^2/(\alpha\sigma_d)^2`    unit variance of the target
min-SNR                 :math:`\min(1, \gamma / \mathrm{SNR})`     data error up to :math:`\gamma`
soft min-SNR            :math:`\gamma / (\mathrm{SNR} + \gamma)`   the same, smooth
bound                   :math:`(e^{\lambda_s - \lambda_t} - 1)/2`  a step of a chain's bound
======================  =========================================  ================================

References:
    Vincent, *A connection between score matching and denoising autoencoders*, 2011.
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 7).
    Song et al. 2021, https://arxiv.org/abs/2101.09258 (likelihood weighting, equation 7).
    Karras et al. 2022, https://arxiv.org/abs/2206.00364 (table 1).
    Hang et al. 2023, https://arxiv.org/abs/2303.09556 (min-SNR).
    Crowson et al. 2024, https://arxiv.org/abs/2401.11605 (soft min-SNR).
"""

from dataclasses import dataclass

from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.loss.weighting import EDMWeighting, NoiseWeighting, Weighting
from scoresde.model import ScoreFunction, ScoreModel, Trainable, check_model
from scoresde.sde import Interpolant
from scoresde.times import LogNormalTimes, Times, UniformTimes


@dataclass(frozen=True)
class DenoisingScoreMatching(Loss):
    """Denoising score matching: the error of the predicted noise at noised data.

    **Defaults.** Without a weighting and times, the best pair measured is used
    (``experiments/training_defaults``): the EDM weighting with log-normal times and a tail of a
    tenth. Networks that return the noise or the score would learn too little about large noise
    with this pair. For them the default is the noise weighting with uniform times. If only one of
    a pair is given, the other is also taken from this second pair.

    Arguments:
        weighting: Weight of each noise level. If None, see above.
        times: Density of the training times. If None, see above. The expectation of the loss does
            not depend on it (except for :class:`~scoresde.times.LogNormalTimes`).
        eps: The smallest time, in [0, 1). If None, the default of the model's SDE is used
            (``sde.cutoffs.training``: 1e-5 for VP and VE, 1e-3 for sub-VP).
        reduce_mean: Whether an example's error is the mean over its D dimensions. If False, it is
            half their sum (:math:`D/2` times the mean), as for NCSN++. Gradient clipping and the
            epsilon of an optimiser then act differently.

    Example:
        >>> import torch
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> loss = DenoisingScoreMatching()
        >>> loss(exact, exact.sample(8, seed=0), seed=0).shape
        torch.Size([8])
    """

    weighting: Weighting | None = None
    times: Times | None = None
    eps: float | None = None
    reduce_mean: bool = True

    def __post_init__(self) -> None:
        kinds = isinstance(self.weighting, Weighting | None), isinstance(self.times, Times | None)
        if not all(kinds):
            raise InputError(
                "weighting and times must be a Weighting such as NoiseWeighting() and a Times "
                f"such as UniformTimes(), or None, got {self.weighting} and {self.times}."
            )

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the weighted squared error of each example; arguments as for the base.

        Given times are used unchanged; drawn times are weighted for their density. The part
        ``noise_error`` is the mean squared error of the noise, unweighted.

        Raises:
            InputError: If ``eps`` is not valid for the SDE, or shapes disagree.
        """
        check_model(model)
        assert isinstance(model, ScoreFunction)
        sde, eps = model.sde, self.first_time(model.sde)
        weighting, times = self.pair(model)
        drawn = given.draw(sde, x, times, eps)
        state = sde.perturb(x, drawn.t, drawn.noise)
        error = model.noise(state, drawn.t, **cond) - drawn.noise
        squares = error.square().flatten(1)
        mean = squares.mean(1)
        size = mean if self.reduce_mean else 0.5 * squares.sum(1)
        weight = (drawn.weight * weighting(sde, drawn.t)).to(x)
        return LossTerms(weight * size, {"noise_error": mean.detach()})

    def pair(self, model: Trainable) -> tuple[Weighting, Times]:
        """Returns the weighting and the times for training a model."""
        neither = self.weighting is None and self.times is None
        # With these, the network determines the data even for the largest noise.
        if neither and not (
            isinstance(model, ScoreModel) and not model.parametrisation.at_zero_snr
        ):
            return EDMWeighting(), LogNormalTimes(tail=0.1)
        return self.weighting or NoiseWeighting(), self.times or UniformTimes()

    def check(self, model: Trainable) -> None:
        check_model(model)
        self.first_time(model.process)

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)
