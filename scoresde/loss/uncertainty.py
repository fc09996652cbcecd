r"""Learned weights of the noise levels, from the uncertainty of their loss.

For the loss :math:`L` of an example at the time t, and a function :math:`u` of its noise level,

.. math:: L_u = e^{-u(\sigma)} L + u(\sigma) .

The derivative of the mean in :math:`u(\sigma)` is :math:`1 - e^{-u} \, E[L \mid \sigma]`, so the
optimum is the logarithm of the level's mean loss,

.. math:: u(\sigma) = \log E[L \mid \sigma], \qquad E[e^{-u} L \mid \sigma] = 1 .

Every noise level then contributes equally, regardless of the size of its loss: the gradient of the
model is that of :math:`E[\log E[L \mid \sigma]]`. For Gaussian errors with the variance
:math:`e^u`, :math:`L_u` is their negative log-likelihood, up to factors.

References:
    Karras et al., *Analyzing and improving the training dynamics of diffusion models*, 2024,
    https://arxiv.org/abs/2312.02696 (section 2.2, equations 14 and 15).
    Kendall et al., *Multi-task learning using uncertainty to weigh losses for scene geometry and
    semantics*, 2018, https://arxiv.org/abs/1705.07115.
"""

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.loss.denoising import DenoisingScoreMatching
from scoresde.model import NoiseLevel, ScoreFunction, Trainable, check_model
from scoresde.nn import FourierEmbedding
from scoresde.recipe import describable
from scoresde.sde import SDE, Interpolant


@describable
class UncertaintyWeighted(Loss, nn.Module):
    r"""Denoising score matching with noise levels weighted by a learned uncertainty.

    The function :math:`u` is linear in Fourier features of :math:`\tfrac14 \log (\sigma /
    \alpha)` and starts at 0. It is trained with the model, is not averaged, and is not used after
    training. Held-out examples are evaluated with the loss without it (:meth:`fixed`).

    The parts are those of that loss, its value :math:`L` as ``error``, and :math:`u` as
    ``uncertainty``.

    Arguments:
        loss: The loss :math:`L`; ``DenoisingScoreMatching()`` by default.
        width: The number of Fourier features, even.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> sorted(UncertaintyWeighted().terms(exact, exact.sample(8, seed=0), seed=0).parts)
        ['error', 'noise_error', 'uncertainty']
    """

    def __init__(self, loss: DenoisingScoreMatching | None = None, width: int = 128) -> None:
        super().__init__()
        self.loss = DenoisingScoreMatching() if loss is None else loss
        if not isinstance(self.loss, DenoisingScoreMatching):
            raise InputError(f"loss must be a DenoisingScoreMatching, got {loss}.")
        self.embedding = FourierEmbedding(width)
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def uncertainty(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns u at times ``(B,)``, with their shape."""
        label = NoiseLevel()(sde, t).to(self.linear.weight)
        with torch.autocast(label.device.type, enabled=False):  # it is an exponent
            return self.linear(self.embedding(label)).squeeze(1)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the weighted loss of each example; arguments as for the base.

        Raises:
            InputError: As for the wrapped loss.
        """
        check_model(model)
        assert isinstance(model, ScoreFunction)
        _, times = self.loss.pair(model)
        eps = self.first_time(model.sde)
        drawn = given.draw(model.sde, x, times, eps)
        found = self.loss.evaluate(model, x, given.at(drawn.t, drawn.noise), **cond)
        u = self.uncertainty(model.sde, drawn.t.expand(len(x))).to(found.value)
        weight = drawn.weight.to(x) if isinstance(drawn.weight, Tensor) else drawn.weight
        parts = {"error": found.value.detach(), "uncertainty": u.detach()}
        return LossTerms(weight * (torch.exp(-u) * found.value + u), found.parts | parts)

    def fixed(self) -> Loss:
        return self.loss

    def check(self, model: Trainable) -> None:
        self.loss.check(model)

    def first_time(self, process: Interpolant) -> float:
        return self.loss.first_time(process)
