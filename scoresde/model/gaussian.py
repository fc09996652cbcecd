"""The exact model of Gaussian data."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model.base import ScoreFunction
from scoresde.model.conjugate import condition
from scoresde.model.exact import check_shape, check_symmetric, floats
from scoresde.model.full_mixture import FullMixtureModel
from scoresde.operators import Observation
from scoresde.passes import count_pass
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand, one_or_each
from scoresde.streams import Purpose, Streams


class GaussianModel(ScoreFunction):
    r"""The exact model of Gaussian data :math:`N(m, C)`.

    The marginal is :math:`N(\alpha m, V)` with :math:`V = \alpha^2 C + \sigma^2 I`, so

    .. math::
        \nabla_x \log p_t(x) = -V^{-1} (x - \alpha m), \qquad
        \frac{d (x - \alpha m)}{dt} = \tfrac12 \frac{dV}{dt} V^{-1} (x - \alpha m)

    along the probability-flow ODE, whose solutions have constant :math:`V^{-1/2} (x - \alpha m)`.

    Arguments:
        mean: The mean, with shape ``(*)`` of one example.
        std: The standard deviation, a positive number or with shape ``(*)``.
        covariance: Alternative to ``std``: the covariance of the flattened data, with shape
            ``(D, D)``, positive definite.
        sde: The forward process.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> exact.score(torch.ones(1, 2), t=0.5)
        tensor([[-1., -1.]])
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None

    def __init__(
        self,
        mean: Tensor | Sequence,
        std: Tensor | float | None = None,
        sde: SDE | None = None,
        *,
        covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        if sde is None or (std is None) == (covariance is None):
            values = {"sde": sde, "std": std, "covariance": covariance}
            given = ", ".join(name for name, value in values.items() if value is not None)
            raise InputError(
                "GaussianModel requires sde and exactly one of std and covariance, got "
                f"{given or 'none of them'}."
            )
        if not isinstance(sde, SDE):
            given = f"the class {sde.__name__}" if isinstance(sde, type) else repr(sde)
            raise InputError(f"sde must be an SDE such as VPSDE(), got {given}.")
        mean = floats(mean)
        if not bool(mean.isfinite().all()):
            bad = mean[~mean.isfinite()]
            raise InputError(
                f"mean must be finite, got {bad[0].item()} in {len(bad)} of {mean.numel()} values."
            )
        variances, basis = _spectrum(mean, std, covariance)
        if not bool((variances > 0).all()):
            raise InputError(
                f"covariance must be positive definite, got the eigenvalue {variances.min():.4g}."
            )
        self.sde = sde
        self.register_buffer("mean", mean)
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._weigh(x, t, lambda alpha, sigma, v: -1 / v)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._weigh(x, t, lambda alpha, sigma, v: sigma / v)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        gain = self._weigh(x, t, lambda alpha, sigma, v: alpha * self.variances / v)
        return self.mean.to(x) + gain

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Returns the log-density of the marginal at ``t`` in nats: ``(B, *)`` to ``(B,)``."""
        y, _, _, v = self._eigen(x, as_time(t))
        return -0.5 * (y**2 / v + torch.log(2 * torch.pi * v)).sum(1)

    @torch.no_grad()  # a schedule may have weights
    def sample(self, n: int, t: Tensor | float = 0.0, *, seed: int | None = None) -> Tensor:
        """Draws ``n`` examples of the marginal at ``t``, with shape ``(n, *)``."""
        z = Streams.of(seed, batch=check_count("n", n), device=self.mean.device).normal(
            self.mean.shape, Purpose.DATA, dtype=self.mean.dtype
        )
        alpha, _, v = self._variances(as_time(t), z)
        y = self._back(z.flatten(1) * torch.sqrt(v)) + alpha * self.mean.flatten()
        return y.reshape(z.shape)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        r"""Moves states along the probability-flow ODE, exactly.

        .. math:: x_s = \alpha_s m + V_s^{1/2} V_t^{-1/2} (x_t - \alpha_t m)

        Arguments:
            x: States at time ``t``, with shape ``(B, *)``.
            t: The time of ``x``.
            s: The time to move to.
        """
        y, _, _, v = self._eigen(x, as_time(t))
        alpha, _, w = self._variances(as_time(s), x)
        moved = self._back(y * torch.sqrt(w / v)) + alpha * self.mean.flatten().to(x)
        return moved.reshape(x.shape)

    @property
    def data_std(self) -> float:
        """The root of the mean variance of the values of an example."""
        return math.sqrt(float(self.variances.mean()))

    def exact_guide(self, observed: Observation) -> FullMixtureModel:
        r"""Returns the exact model of the data given an observation, a mixture of one component.

        .. math:: N(m + K (y - A m), C - K A C), \qquad K = C A^T (A C A^T + \Sigma)^{-1}

        Arguments:
            observed: A linear observation of one example, or of each of B examples.

        Raises:
            InputError: If the observation is not linear, or its noiseless measurements are
                linearly dependent.
        """
        log_density, means, covariances = self._condition(observed)
        means, covariances = means.to(self.mean), covariances.to(self.mean)
        return FullMixtureModel(torch.ones_like(log_density), means, covariances, self.sde)

    def log_evidence(self, observed: Observation) -> Tensor:
        """Returns log p(y) in nats, ``(B,)``, or ``(1,)`` for one y; arguments as above."""
        return self._condition(observed)[0][:, 0]

    def _condition(self, observed: Observation) -> tuple[Tensor, Tensor, Tensor]:
        covariance = torch.diag(self.variances)
        if self.basis is not None:
            covariance = self.basis @ covariance @ self.basis.T
        return condition(observed, self.mean[None], covariance[None])

    def _variances(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns alpha, sigma ``(B or 1, 1)``, and the eigenvalues of V ``(B or 1, D)``."""
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = alpha**2 * self.variances + sigma**2
        return alpha.to(x), sigma.to(x), v.to(x)

    def _eigen(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m in the eigenbasis ``(B, D)``, alpha, sigma and V."""
        alpha, sigma, v = self._variances(t, x)
        check_shape(x, self.mean.shape)
        y = x.flatten(1) - alpha * self.mean.flatten().to(x)
        return (y if self.basis is None else y @ self.basis.to(x)), alpha, sigma, v

    def _back(self, y: Tensor) -> Tensor:
        return y if self.basis is None else y @ self.basis.to(y).T

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        signal, noise = (
            one_or_each(rate(t), x) for rate in (self.sde.alpha_dot, self.sde.sigma_dot)
        )

        def gain(alpha: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
            return (signal * alpha * self.variances + noise * sigma) / v

        mean = expand(self.sde.alpha_dot(t), x) * self.mean.to(x)
        return mean + self._weigh(x, t, gain)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.mean.shape)

    def _weigh(self, x: Tensor, t: Tensor, gain: Callable[..., Tensor]) -> Tensor:
        """Multiplies x - alpha m by a function of V; this counts as one pass."""
        count_pass(len(x))
        y, alpha, sigma, v = self._eigen(x, as_time(t))
        return self._back(y * gain(alpha, sigma, v).to(y)).reshape(x.shape)


def _spectrum(
    mean: Tensor, std: Tensor | float | None, covariance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the eigenvalues ``(D,)`` and eigenbasis (None if it is the axes) of a covariance."""
    if covariance is None:
        assert std is not None
        std = floats(std, mean)
        if std.ndim > 0 and std.shape != mean.shape:
            raise InputError(
                f"std must be a number or have the shape of the mean, {tuple(mean.shape)}, got "
                f"shape {tuple(std.shape)}."
            )
        if not bool(((std > 0) & std.isfinite()).all()):
            raise InputError(
                f"std must be positive and finite, got {std.min():.4g} to {std.max():.4g}."
            )
        return std.expand(mean.shape).flatten() ** 2, None
    covariance = floats(covariance, mean)
    if covariance.shape != (mean.numel(), mean.numel()):
        raise InputError(
            f"covariance must have shape {(mean.numel(), mean.numel())}, a row and a column per "
            f"dimension of the mean, got {tuple(covariance.shape)}."
        )
    check_symmetric(covariance)
    variances, basis = torch.linalg.eigh(covariance)
    return variances, basis
