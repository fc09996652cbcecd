"""The exact model of a mixture of Gaussians."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model.base import ScoreFunction
from scoresde.model.exact import check_shape, floats
from scoresde.passes import count_pass
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand, one_or_each
from scoresde.streams import Purpose, Streams


class GaussianMixtureModel(ScoreFunction):
    r"""The exact model of a mixture of isotropic Gaussians :math:`\sum_k w_k N(m_k, s_k^2 I)`.

    The marginal is the mixture of :math:`N(\alpha m_k, v_k I)`, :math:`v_k = \alpha^2 s_k^2 +
    \sigma^2`, and with the responsibilities :math:`r_k(x) \propto w_k N(x; \alpha m_k, v_k I)`

    .. math::
        \nabla_x \log p_t(x) = -\sum_k r_k \frac{x - \alpha m_k}{v_k}, \qquad
        D(x, t) = \sum_k r_k \left( m_k + \frac{\alpha s_k^2}{v_k} (x - \alpha m_k) \right) .

    Arguments:
        weights: The weights, positive, with shape ``(K,)``; they are normalised.
        means: The means, with shape ``(K, *)``.
        stds: The standard deviations, positive, with shape ``(K,)``.
        sde: The forward process.
    """

    log_weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        weights: Tensor | Sequence,
        means: Tensor | Sequence,
        stds: Tensor | Sequence,
        sde: SDE,
    ) -> None:
        super().__init__()
        means = floats(means)
        weights = floats(weights, means)
        stds = floats(stds, means)
        if means.ndim < 2 or not weights.shape == stds.shape == means.shape[:1]:
            raise InputError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and stds "
                f"{tuple(stds.shape)} do not fit; give (K,), (K, *) and (K,)."
            )
        if not (bool((weights > 0).all()) and bool((stds > 0).all())):
            raise InputError("A weight or a std of the mixture is not positive; make it positive.")
        self.sde = sde
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, _, v = self._posterior(x, t)
        return -self._mix(responsibilities / v, deviations, x)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, sigma, v = self._posterior(x, t)
        return self._mix(responsibilities * sigma / v, deviations, x)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, alpha, _, v = self._posterior(x, t)
        means = responsibilities @ self.means.flatten(1).to(x)
        gain = alpha * self.stds.to(x) ** 2 / v
        return means.reshape(x.shape) + self._mix(responsibilities * gain, deviations, x)

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        deviations, responsibilities, alpha, sigma, v = self._posterior(x, t)
        signal, noise = (
            one_or_each(rate(t), x).to(x) for rate in (self.sde.alpha_dot, self.sde.sigma_dot)
        )
        gain = (signal * alpha * self.stds.to(x) ** 2 + noise * sigma) / v
        means = signal * (responsibilities @ self.means.flatten(1).to(x))
        return means.reshape(x.shape) + self._mix(responsibilities * gain, deviations, x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.means.shape[1:])

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Returns the log-density of the marginal at ``t`` in nats: ``(B, *)`` to ``(B,)``."""
        _, joint, _, _, _ = self._components(x, as_time(t))
        return torch.logsumexp(joint, 1)

    def sample(self, n: int, t: Tensor | float = 0.0, *, seed: int | None = None) -> Tensor:
        """Draws ``n`` examples of the marginal at ``t``, with shape ``(n, *)``."""
        streams = Streams.of(seed, batch=check_count("n", n), device=self.means.device)
        u = streams.uniform((), Purpose.COMPONENT, dtype=torch.float64)
        edges = self.log_weights.double().exp().cumsum(0)[:-1]
        k = torch.searchsorted(edges, u)
        z = streams.normal(self.means.shape[1:], Purpose.DATA, dtype=self.means.dtype)
        alpha, sigma = self.sde.alpha(as_time(t)), self.sde.sigma(as_time(t))
        std = torch.sqrt(alpha**2 * self.stds[k] ** 2 + sigma**2)
        return expand(alpha, z) * self.means[k] + expand(std, z) * z

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m_k ``(B, K, D)``, log w_k N_k ``(B, K)``, and alpha, sigma, v_k."""
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = (alpha**2 * self.stds**2 + sigma**2).to(x)
        alpha, sigma = alpha.to(x), sigma.to(x)
        check_shape(x, self.means.shape[1:])
        means = self.means.flatten(1).to(x)
        deviations = x.flatten(1).unsqueeze(1) - alpha.unsqueeze(2) * means
        dimension = means.shape[1]
        log_normals = -0.5 * ((deviations**2).sum(2) / v + dimension * torch.log(2 * torch.pi * v))
        return deviations, self.log_weights.to(x) + log_normals, alpha, sigma, v

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`_components` does, with responsibilities: this is one pass."""
        count_pass(len(x))
        deviations, joint, alpha, sigma, v = self._components(x, as_time(t))
        return deviations, torch.softmax(joint, 1), alpha, sigma, v

    @staticmethod
    def _mix(weights: Tensor, deviations: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", weights, deviations).reshape(x.shape)
