r"""Posterior models, each with a different covariance of :math:`y \mid x_t`.

- :class:`MMPS`: the model's own covariance; exact for a Gaussian prior.
- :class:`PiGDM`: the covariance for data N(m, s^2 I); exact for this prior.
- :class:`TMPD`: the row sums of :math:`A \mathrm{Cov} A^T`; exact for a Gaussian prior if this
  matrix is diagonal.
- :class:`DPS`: the noise of y only; its samples are too close to y and too narrow.

No method is exact for other priors, and MMPS is not the best one for separate modes.
"""

import math
from typing import final

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.inverse.posterior import Local, Posterior, require_noise
from scoresde.inverse.solver import solve
from scoresde.model import ScoreFunction, ScoreModel
from scoresde.operators import Observation
from scoresde.shapes import expand

_OF_A_NETWORK = 5  # iterations; measured in experiments/inverse_problems


@final
class MMPS(Posterior):
    r"""Moment-matching posterior sampling (MMPS), with the covariance of the model itself.

    .. math:: u = (A \, \mathrm{Cov}[x_0 \mid x_t] \, A^T + \Sigma)^{-1} (y - A D)

    It samples the posterior of a Gaussian prior exactly, if the linear equation is solved. Each
    iteration of the solver costs one product with the transposed Jacobian, and one iteration per
    measurement suffices. The Jacobian of a network has errors, and further iterations fit the
    weights to them: on digits 5 iterations, the default for networks, are better than 50
    (``experiments/inverse_problems``). A non-linear operator is linearised at D.

    Arguments:
        model: Score function of the prior.
        observed: Observation; its noise may be 0.
        tolerance: Relative residual of the solver for each example, in (0, 1).
        iterations: Maximum number of iterations of the solver, positive. If None, 5 for a model
            with a network; for an exact model the dimension of y, at most 50.

    Raises:
        InputError: If the observation is not of examples of the model, or a number is out of
            range.

    References:
        Rozet et al., *Learning diffusion priors from observations by expectation maximization*,
        2024, https://arxiv.org/abs/2405.13712 (section 4.2).

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> from scoresde.operators import Masking
        >>> prior = GaussianModel(torch.zeros(1), 1.0, VPSDE())
        >>> seen = Observation(Masking(torch.tensor([True])), torch.tensor([2.0]), std=1.0)
        >>> MMPS(prior, seen).denoise(torch.zeros(1, 1), 1.0)  # all but noise: E[x_0 | y]
        tensor([[1.0000]])
    """

    def __init__(
        self,
        model: ScoreFunction,
        observed: Observation,
        tolerance: float = 1e-4,
        iterations: int | None = None,
    ) -> None:
        super().__init__(model, observed)
        self.tolerance = _below_one("tolerance", tolerance)
        if iterations is None:
            learned = any(isinstance(part, ScoreModel) for part in model.modules())
            self.iterations = _OF_A_NETWORK if learned else None
        else:
            self.iterations = check_count("iterations", iterations)

    def around(self, model: ScoreFunction, observed: Observation) -> "MMPS":
        return MMPS(model, observed, self.tolerance, self.iterations)

    def weights(self, local: Local) -> Tensor:
        near = local.near

        def matrix(u: Tensor) -> Tensor:
            return near.push(local.covariance(near.pull(u))) + near.variance * u

        return solve(matrix, near.residual, self.tolerance, self.iterations)


@final
class PiGDM(Posterior):
    r"""Pseudo-inverse guidance (PiGDM), with the covariance for isotropic Gaussian data.

    .. math:: u = (r^2 A A^T + \Sigma)^{-1} (y - A D), \qquad
              r^2 = \frac{s^2 \sigma^2}{\alpha^2 s^2 + \sigma^2}

    with :math:`s` the data's standard deviation; :math:`r^2 = \sigma^2 / (1 + \sigma^2)` of the
    paper is VE with s = 1. It samples the posterior exactly if the prior is :math:`N(m, s^2 I)`.
    The guidance is part of the denoised estimate, so it does not grow with the number of steps,
    unlike the published step. A non-linear operator is linearised at D.

    Arguments:
        model: Score function of the prior.
        observed: Observation; its noise may be 0.
        data_std: Standard deviation s of the data in model units, positive. If None,
            ``model.data_std``, or 1 if the model has none. An exact model computes it; for a
            :class:`ScoreModel` it is ``sigma_data`` of its parametrisation.
        tolerance: Relative residual of the solver, in (0, 1). The solver needs no Jacobian
            products.
        iterations: Maximum number of iterations. If None, the dimension of y, at most 50.

    Raises:
        InputError: If the observation is not of examples of the model, or a number is out of
            range.

    References:
        Song et al., *Pseudoinverse-guided diffusion models for inverse problems*, ICLR 2023
        (equations 7 and 8).
    """

    def __init__(
        self,
        model: ScoreFunction,
        observed: Observation,
        data_std: float | None = None,
        tolerance: float = 1e-5,
        iterations: int | None = None,
    ) -> None:
        super().__init__(model, observed)
        known = model.data_std if data_std is None else data_std
        self._data_std = _positive("data_std", 1.0 if known is None else known)
        self.tolerance = _below_one("tolerance", tolerance)
        self.iterations = None if iterations is None else check_count("iterations", iterations)

    @property
    def data_std(self) -> float:
        """Assumed standard deviation of the data."""
        return self._data_std

    def around(self, model: ScoreFunction, observed: Observation) -> "PiGDM":
        return PiGDM(model, observed, self.data_std, self.tolerance, self.iterations)

    def weights(self, local: Local) -> Tensor:
        near, r = local.near, local.near.residual
        signal = (self.sde.alpha(local.t) * self.data_std) ** 2
        noise = self.sde.sigma(local.t) ** 2
        variance = expand(self.data_std**2 * noise / (signal + noise), r)

        def matrix(u: Tensor) -> Tensor:
            return variance * near.push(near.pull(u)) + near.variance * u

        return solve(matrix, r, self.tolerance, self.iterations)


@final
class TMPD(Posterior):
    r"""Tweedie moment projected diffusion (TMPD): row sums of the measurements' covariance.

    .. math:: u = (y - A D) / (A \, \mathrm{Cov} \, A^T 1 + \Sigma)

    It costs two products with the transposed Jacobian. Row sums can be negative if measurements
    are negatively correlated; these are replaced by 0. For separate modes it is often better than
    :class:`MMPS`.

    Arguments:
        model: Score function of the prior.
        observed: Observation with noise, by a linear operator.

    Raises:
        InputError: If the observation is not of examples of the model, is not linear, or has no
            noise.

    References:
        Boys et al., *Tweedie moment projected diffusions for inverse problems*, 2023,
        https://arxiv.org/abs/2310.06721 (section 3).
    """

    def __init__(self, model: ScoreFunction, observed: Observation) -> None:
        super().__init__(model, observed)
        require_noise(observed, "TMPD")
        if not observed.linear:
            raise InputError(
                f"operator must be linear for TMPD, got {type(observed.operator).__name__}; use "
                "DPS, MMPS or PiGDM."
            )

    def around(self, model: ScoreFunction, observed: Observation) -> "TMPD":
        return TMPD(model, observed)

    def weights(self, local: Local) -> Tensor:
        near = local.near
        ones = torch.ones_like(near.residual)
        sums = near.push(local.covariance(near.pull(ones)))
        return near.residual / (sums.clamp(min=0) + near.variance)


@final
class DPS(Posterior):
    r"""Diffusion posterior sampling (DPS) in likelihood form, without a covariance.

    .. math:: u = (y - A D) / \Sigma

    This is the gradient of :math:`\log p(y \mid x_0 = D)`. The sampled law is wrong even for a
    Gaussian prior: too close to y, and too narrow. For the prior N(0, C) and A = 1, with a = C /
    std^2, it samples

    .. math::
        \text{ODE: } N\left(y \sqrt{2 a}\, F(\sqrt{a / 2}), \; C e^{-a}\right), \qquad
        \text{SDE: } N\left(y (1 - e^{-a}), \; \tfrac12 \mathrm{std}^2 (1 - e^{-2 a})\right)

    with Dawson's function F, where the posterior is :math:`N(y a / (1 + a), C / (1 + a))`. For
    C = y = 1 and std = 0.5 the variances are 0.0183 and 0.125; that of the posterior is 0.2.

    Its equation is stiff where the noise is small: on a ``LogSNRGrid`` a sampler needs about 2 a
    steps, and with fewer it diverges.

    Arguments:
        model: Score function of the prior.
        observed: Observation with noise; the operator may be non-linear.

    Raises:
        InputError: If the observation is not of examples of the model, or has no noise.

    References:
        Chung et al., *Diffusion posterior sampling for general noisy inverse problems*, ICLR 2023,
        https://arxiv.org/abs/2209.14687 (equation 14, with the factor of the likelihood; their
        algorithm has a step size in its place).
    """

    def __init__(self, model: ScoreFunction, observed: Observation) -> None:
        super().__init__(model, observed)
        require_noise(observed, "DPS")

    def around(self, model: ScoreFunction, observed: Observation) -> "DPS":
        return DPS(model, observed)

    def weights(self, local: Local) -> Tensor:
        return local.near.residual / local.near.variance


def _below_one(name: str, value: float) -> float:
    """Checks a relative residual: with 1 or more, the solver would return 0, for the prior."""
    if not 0 < value < 1:
        raise InputError(f"{name} must be in (0, 1), got {value}; a typical value is 1e-4.")
    return float(value)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value}.")
    return float(value)
