"""The exact model of a mixture of Gaussians."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model.components import Mixture, check_labels
from scoresde.model.conjugate import condition
from scoresde.model.exact import check_shape, floats
from scoresde.model.full_mixture import FullMixtureModel
from scoresde.operators import Observation
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand, one_or_each
from scoresde.streams import Purpose, Streams


class GaussianMixtureModel(Mixture):
    r"""The exact model of a mixture of isotropic Gaussians :math:`\sum_k w_k N(m_k, s_k^2 I)`.

    The marginal is the mixture of :math:`N(\alpha m_k, v_k I)`, :math:`v_k = \alpha^2 s_k^2 +
    \sigma^2`, and with the responsibilities :math:`r_k(x) \propto w_k N(x; \alpha m_k, v_k I)`

    .. math::
        \nabla_x \log p_t(x) = -\sum_k r_k \frac{x - \alpha m_k}{v_k}, \qquad
        D(x, t) = \sum_k r_k \left( m_k + \frac{\alpha s_k^2}{v_k} (x - \alpha m_k) \right) .

    **Classes.** If each component has a class, the model is conditional: given the condition
    ``label``, it uses only the components of that class, with weights that add up to 1, and

    .. math:: p(c \mid x_t) = \sum_{k \in c} r_k(x_t) .

    Arguments:
        weights: The weights, positive, with shape ``(K,)``; they are normalised.
        means: The means, with shape ``(K, *)``.
        stds: The standard deviations, positive, with shape ``(K,)``.
        sde: The forward process.
        labels: The class of each component, integers from 0 with shape ``(K,)``, with every class
            up to the largest present; None for a model without classes.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> two = GaussianMixtureModel([1, 1], [[-2.0], [2.0]], [0.5, 0.5], VPSDE(), labels=[0, 1])
        >>> two.class_log_prob(torch.tensor([[-2.0]]), 0.1).exp().round(decimals=3)
        tensor([[1., 0.]])
    """

    means: Tensor
    stds: Tensor

    def __init__(
        self,
        weights: Tensor | Sequence,
        means: Tensor | Sequence,
        stds: Tensor | Sequence,
        sde: SDE,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        means = floats(means)
        weights = floats(weights, means)
        stds = floats(stds, means)
        if means.ndim < 2 or not weights.shape == stds.shape == means.shape[:1]:
            raise InputError(
                "weights, means and stds must have shapes (K,), (K, *) and (K,), got "
                f"{tuple(weights.shape)}, {tuple(means.shape)} and {tuple(stds.shape)}."
            )
        if not (bool((weights > 0).all()) and bool((stds > 0).all())):
            raise InputError(
                f"weights and stds must be positive, got minima {weights.min():.4g} and "
                f"{stds.min():.4g}."
            )
        self.sde = sde
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        known = None if labels is None else check_labels(torch.as_tensor(labels), len(means))
        self.register_buffer("labels", known, persistent=known is not None)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, _, v = self._posterior(x, t, cond)
        return -self._mix(responsibilities / v, deviations, x)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, sigma, v = self._posterior(x, t, cond)
        return self._mix(responsibilities * sigma / v, deviations, x)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, alpha, _, v = self._posterior(x, t, cond)
        means = responsibilities @ self.means.flatten(1).to(x)
        gain = alpha * self.stds.to(x) ** 2 / v
        return means.reshape(x.shape) + self._mix(responsibilities * gain, deviations, x)

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        deviations, responsibilities, alpha, sigma, v = self._posterior(x, t, cond)
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

    @property
    def data_std(self) -> float:
        """The root of the mean variance of the values of an example."""
        weights, means = self.log_weights.exp()[:, None], self.means.flatten(1)
        spread = (weights * (means - (weights * means).sum(0)) ** 2).sum(0).mean()
        return math.sqrt(float(spread + (weights[:, 0] * self.stds**2).sum()))

    def exact_guide(self, observed: Observation) -> FullMixtureModel:
        r"""Returns the exact model of the data given an observation.

        The posterior of :math:`N(m_k, s_k^2 I)` is Gaussian, and the weights become
        :math:`\propto w_k \, p(y \mid k)`. Labels select components as before.

        Arguments:
            observed: A linear observation of one example, or of each of B examples.

        Raises:
            InputError: If the observation is not linear, or its noiseless measurements are
                linearly dependent.
        """
        log_density, means, covariances = self._condition(observed)
        weights = torch.softmax(self.log_weights.double() + log_density, 1)
        weights, means, covariances = (p.to(self.means) for p in (weights, means, covariances))
        return FullMixtureModel(weights, means, covariances, self.sde, self.labels)

    def log_evidence(self, observed: Observation) -> Tensor:
        """Returns log p(y) in nats, ``(B,)``, or ``(1,)`` for one y; arguments as above."""
        log_density, _, _ = self._condition(observed)
        return torch.logsumexp(self.log_weights.double() + log_density, 1)

    def _condition(self, observed: Observation) -> tuple[Tensor, Tensor, Tensor]:
        variances = self.stds[:, None].expand(-1, self.means[0].numel()) ** 2
        return condition(observed, self.means, torch.diag_embed(variances))

    @torch.no_grad()  # a schedule may have weights
    def sample(
        self,
        n: int,
        t: Tensor | float = 0.0,
        *,
        seed: int | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Draws ``n`` examples of the marginal at ``t``, with shape ``(n, *)``.

        Arguments:
            n: The number of examples, positive.
            t: The time.
            seed: Seed of the random streams. If None, a new one is drawn.
            label: The class of each, int64 ``(n,)``; -1, or None, for the whole mixture.
        """
        streams = Streams.of(seed, batch=check_count("n", n), device=self.means.device)
        u = streams.uniform((), Purpose.COMPONENT, dtype=torch.float64)
        if label is None:
            k = torch.searchsorted(self.log_weights.double().exp().cumsum(0)[:-1], u)
        else:
            edges = self._log_weights(label).double().exp().cumsum(1)[:, :-1]
            k = (u[:, None] > edges).sum(1)
        z = streams.normal(self.means.shape[1:], Purpose.DATA, dtype=self.means.dtype)
        alpha, sigma = self.sde.alpha(as_time(t)), self.sde.sigma(as_time(t))
        std = torch.sqrt(alpha**2 * self.stds[k] ** 2 + sigma**2)
        return expand(alpha, z) * self.means[k] + expand(std, z) * z

    def _components(
        self, x: Tensor, t: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m_k ``(B, K, D)``, log w_k N_k ``(B, K)``, and alpha, sigma, v_k."""
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = (alpha**2 * self.stds**2 + sigma**2).to(x)
        alpha, sigma = alpha.to(x), sigma.to(x)
        check_shape(x, self.means.shape[1:])
        means = self.means.flatten(1).to(x)
        deviations = x.flatten(1).unsqueeze(1) - alpha.unsqueeze(2) * means
        dimension = means.shape[1]
        log_normals = -0.5 * ((deviations**2).sum(2) / v + dimension * torch.log(2 * torch.pi * v))
        log_weights = self.log_weights if label is None else self._log_weights(label)
        return deviations, log_weights.to(x) + log_normals, alpha, sigma, v

    @staticmethod
    def _mix(weights: Tensor, deviations: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", weights, deviations).reshape(x.shape)
