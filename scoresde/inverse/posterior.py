r"""Posteriors: models of examples given an observation.

Given :math:`y = A x_0 + n`, :math:`n \sim N(0, \Sigma)`, the score of :math:`p_t(x \mid y)` is
that of the model plus :math:`\nabla_x \log p(y \mid x)`. Every method here replaces :math:`p(y
\mid x_t)` by a Gaussian, which gives weights :math:`u` of the measurements,

.. math:: D_g = D + \mathrm{Cov}\, A^T u, \qquad
          \mathrm{Cov} = \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma^2}{\alpha} J^T, \qquad
          \hat z_g = \frac{x - \alpha D_g}{\sigma} = \hat z - \sigma J^T A^T u,

with the Jacobian :math:`J` of the denoised estimate :math:`D`, which is symmetric for an exact
model, and only nearly so for a network. An evaluation costs one network
evaluation, one product with :math:`J^T`, and the products that the weights require.

**No signal.** At t = 1 of a process with zero SNR, :math:`J = 0` and the covariance is 0/0. Its
value at the time with :math:`\alpha / \sigma = 10^{-3}` is used instead.

A posterior is a model, so it works with every sampler. It also works with a likelihood, which
differentiates it once more. Its parameters receive no gradients.

References:
    Song et al., *Pseudoinverse-guided diffusion models for inverse problems*, ICLR 2023.
    Rozet et al., *Learning diffusion priors from observations by expectation maximization*, 2024,
    https://arxiv.org/abs/2405.13712.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.errors import InputError
from scoresde.guidance.base import Around
from scoresde.model import ScoreFunction
from scoresde.operators import Linearised, Observation
from scoresde.passes import count_products
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand

_LEAST_LOG_SNR = 2 * math.log(1e-3)


@dataclass(frozen=True)
class Local:
    r"""Local model at one state: the Gaussian :math:`N(D, \mathrm{Cov})` and y near D.

    Arguments:
        t: The time, ``()`` or ``(B,)``.
        mean: Denoised estimate D of the model, with shape ``(B, *)``.
        near: The observation, linearised at D.
        covariance: Function for the product with :math:`(\sigma^2 / \alpha) J^T`, from ``(B, *)``
            to ``(B, *)``; each call is one product with a transposed Jacobian.
    """

    t: Tensor
    mean: Tensor
    near: Linearised
    covariance: Callable[[Tensor], Tensor]


class Posterior(Around):
    """Base class for posteriors; subclasses implement :meth:`weights` and :meth:`around`.

    Arguments:
        model: Score function of the prior.
        observed: The observation.

    Raises:
        InputError: If the observation is not of examples of the model.
    """

    def __init__(self, model: ScoreFunction, observed: Observation) -> None:
        super().__init__(model)
        self.observed = check_observation(observed).to(model.device)
        if model.shape is not None and observed.rows is None:
            self.observed.check(model.shape)

    @abstractmethod
    def weights(self, local: Local) -> Tensor:
        """Returns the weights u of the measurements, with shape ``(B, ...)``."""

    @abstractmethod
    def around(self, model: ScoreFunction, observed: Observation) -> "Posterior":
        """Returns the same method for another model and observation."""

    def take(self, rows: Tensor) -> "Posterior":
        return self.around(cast(ScoreFunction, self.model.take(rows)), self.observed.take(rows))

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        local = self.at(x, t, **cond)
        pulled = local.near.pull(self.weights(local))
        shift = local.covariance(pulled)
        if shift.device.type == "cpu":  # on a GPU this would synchronise at every evaluation
            _check_shift(x, pulled, shift)
        return local.mean + shift

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        t = as_time(t)
        alpha, sigma = (expand(part, x) for part in (self.sde.alpha(t), self.sde.sigma(t)))
        return (x - alpha * self.denoise(x, t, **cond)) / sigma

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return -self.noise(x, t, **cond) / expand(self.sde.sigma(as_time(t)), x)

    def at(self, x: Tensor, t: Tensor, **cond: Tensor) -> Local:
        """Evaluates the model at states ``(B, *)`` and linearises the observation there.

        The result can be differentiated in ``x`` only if ``x`` requires a gradient and gradients
        are enabled. Otherwise the graph of this evaluation serves only the products with the
        covariance.
        """
        graph = torch.is_grad_enabled() and x.requires_grad
        x, t = with_signal(self.sde, x, as_time(t))
        with torch.enable_grad(), _twice(graph):
            leaf = x if graph else x.detach().requires_grad_()
            data = self.model.denoise(leaf, t, **cond)
        if not data.requires_grad:
            raise InputError(
                "model must be differentiable in its input, got an output without a gradient "
                f"from {type(self.model).__name__}; remove detach or torch.no_grad from it."
            )
        gain = self.sde.sigma(t) ** 2 / self.sde.alpha(t)

        def covariance(v: Tensor) -> Tensor:
            count_products(len(v))
            with _twice(graph):
                (product,) = torch.autograd.grad(
                    data,
                    leaf,
                    v.to(data),
                    retain_graph=True,
                    create_graph=graph,
                    materialize_grads=True,
                )
            return expand(gain, product) * product

        mean = data if graph else data.detach()
        return Local(t, mean, self.observed.linearise(mean), covariance)


def with_signal(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Returns states and times, moved to times with a positive SNR."""
    if not sde.zero_snr:
        return x, t
    last = sde.time(torch.tensor(_LEAST_LOG_SNR, dtype=t.dtype, device=t.device))
    s = torch.minimum(t, last)
    return x * expand(sde.sigma(s) / sde.sigma(t), x), s


def _twice(needed: bool) -> AbstractContextManager[Any]:
    """Makes attention twice differentiable; torch's fused kernels are not."""
    return sdpa_kernel(SDPBackend.MATH) if needed else nullcontext()


def _check_shift(x: Tensor, pulled: Tensor, shift: Tensor) -> None:
    """Checks the shift that an observation adds to the denoised estimate.

    Raises:
        InputError: If the network has no Jacobian, or the sampler has diverged.
    """
    if not bool(shift.any()) and bool(pulled.any()):
        raise InputError(
            "model must have a non-zero Jacobian, got a product with it that is exactly 0; "
            "remove detach or torch.no_grad from the network, and clip the posterior instead of "
            "the model."
        )
    if not bool(shift.isfinite().all()) and bool(x.isfinite().all()):
        raise InputError(
            "The posterior must stay finite, got infinite or NaN values from finite states; use "
            "more steps at small noise (LogSNRGrid), a larger std, or PiGDM."
        )


def check_observation(observed: object) -> Observation:
    """Returns an observation.

    Raises:
        InputError: If the argument is not an observation.
    """
    if not isinstance(observed, Observation):
        raise InputError(
            "observed must be an Observation such as Observation(operator, y, std), got "
            f"{type(observed).__name__}."
        )
    return observed


def require_noise(observed: Observation, method: str) -> None:
    """Checks that every measurement has noise.

    Raises:
        InputError: If a std is 0.
    """
    if observed.rows is None and observed.noiseless:
        raise InputError(
            f"std must be positive for {method}, got {observed.std}; use MMPS or PiGDM."
        )
