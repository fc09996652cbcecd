r"""The loss for training an autoencoder and the diffusion model of its latents together.

In the evidence lower bound, the divergence from the prior is a negative entropy plus a cross
entropy. The cross entropy is the variational bound of the diffusion at the latents,

.. math:: L = \mathbb{E}_{q(z \mid x)} \left[ -\log p(x \mid z) + \log q(z \mid x) \right]
          + \mathrm{CE}, \qquad
          \mathrm{CE} = \mathbb{E} \left[ \tfrac12 \int_{\lambda(1)}^{\lambda(\epsilon)}
          \lVert n - \hat n(z_t, t) \rVert^2 d\lambda + \mathrm{KL}_1 \right]
          + \tfrac{D}{2} \log(2 \pi e s^2) ,

where :math:`s = \sigma / \alpha` at the cut-off. The published form omits
:math:`\mathrm{KL}_1 = \mathrm{KL}(q(z_1 \mid z) \,\|\, p(z_1))`. Without it, latents so large that
they are still visible in the noise at t = 1 cost the encoder nothing, and the cross entropy itself
is too small (by 1e-4 nats for a normal law whose log-SNR ends at -8).

The last term assumes that the squared error of the noise at the cut-off is D. For the exact model
it is smaller by :math:`\sum s^2 / c`, for data with the variances c.

References:
    Vahdat et al. 2021, https://arxiv.org/abs/2106.05931 (theorem 1).
"""

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from scoresde.codec import VAE
from scoresde.errors import InputError
from scoresde.likelihood import prior_kl
from scoresde.loss.base import Draw, Given, Loss, LossTerms
from scoresde.loss.elbo import check_weight, latent_noise, risen
from scoresde.model import LatentModel, ScoreFunction, Trainable
from scoresde.sde import Interpolant, as_time
from scoresde.shapes import sum_features
from scoresde.times import ImportanceTimes, LowDiscrepancy, Times


def cross_entropy(
    prior: ScoreFunction, z: Tensor, drawn: Draw, eps: float, **cond: Tensor
) -> Tensor:
    """Estimates the cross entropy of latents and their diffusion model, from one time each.

    Arguments:
        prior: The model of the latents.
        z: The latents, ``(B, *)``; gradients flow to them.
        drawn: Times and noise.
        eps: The cut-off.
        **cond: Conditions for the prior, each with shape ``(B, *)``.

    Returns:
        Nats, ``(B,)``.
    """
    sde, t = prior.sde, drawn.t
    error = prior.noise(sde.perturb(z, t, drawn.noise), t, **cond) - drawn.noise
    rate = (1 - eps) * drawn.weight * (sde.g(t) / sde.sigma(t)) ** 2
    last = math.log(2 * math.pi * math.e) - float(sde.log_snr(as_time(eps)))
    size = 0.5 * z.shape[1:].numel()
    return 0.5 * rate.to(z) * sum_features(error.square()) + prior_kl(sde, z) + size * last


@dataclass(frozen=True)
class LatentELBO(Loss):
    """The negative evidence lower bound of a latent model, in nats of model units.

    The parts are ``reconstruction``, ``entropy`` (of the encoder) and ``cross_entropy``.

    Arguments:
        beta: The weight of the cross entropy minus the entropy, non-negative.
        warmup: The number of updates over which ``beta`` rises from 0; 0 for no warm-up.
        times: The density of times.
        eps: The cut-off, in [0, 1). If None, that of the likelihood, ``sde.cutoffs.likelihood``.

    Raises:
        InputError: If a value is out of range.
    """

    beta: float = 1.0
    warmup: int = 0
    times: Times = field(default_factory=lambda: LowDiscrepancy(ImportanceTimes()))
    eps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, Times):
            raise InputError(
                f"times must be a Times, such as ImportanceTimes(), got {self.times}."
            )
        for name in ("beta", "warmup"):
            check_weight(name, getattr(self, name))

    def at(self, step: int) -> "LatentELBO":
        return replace(self, beta=self.beta * risen(step, self.warmup), warmup=0)

    def fixed(self) -> "LatentELBO":
        return replace(self, beta=1.0, warmup=0)

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the loss of each example; arguments as for the base.

        ``t`` and ``noise`` belong to the diffusion; ``noise`` has the shape of the latents.
        """
        self.check(model)
        assert isinstance(model, LatentModel)
        assert isinstance(model.codec, VAE)
        vae, eps = model.codec, self.first_time(model.process)
        own = latent_noise(vae, given)
        seen = vae.likelihood.seen(vae.state(x))
        law = vae.encoder.law(seen)
        z = law.sample(own)
        drawn = given.draw(model.process, z, self.times, eps)
        found = vae.likelihood.log_prob(seen, vae.decode(z))
        entropy, cross = -law.log_prob(z), cross_entropy(model.prior, z, drawn, eps, **cond)
        parts = {"reconstruction": found, "entropy": entropy, "cross_entropy": cross}
        value = self.beta * (cross - entropy) - found
        return LossTerms(value, {name: part.detach() for name, part in parts.items()})

    def check(self, model: Trainable) -> None:
        if not isinstance(model, LatentModel) or not isinstance(model.codec, VAE):
            inner = type(model.codec).__name__ if isinstance(model, LatentModel) else "none"
            raise InputError(
                f"model must be a LatentModel of a VAE, got {type(model).__name__} of {inner}; "
                "use LatentModel(vae, prior)."
            )
        self.first_time(model.process)

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.likelihood if self.eps is None else self.eps)
