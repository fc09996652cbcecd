"""The exact model of a mixture of Gaussians with covariances, such as an exact posterior."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model.components import Mixture, check_labels
from scoresde.model.exact import check_shape, floats
from scoresde.sde import SDE, as_time
from scoresde.shapes import expand, one_or_each
from scoresde.streams import Purpose, Streams


class FullMixtureModel(Mixture):
    r"""The exact model of a mixture of Gaussians with covariances, :math:`\sum_k w_k N(m_k, C_k)`.

    With :math:`V_k = \alpha^2 C_k + \sigma^2 I` and the responsibilities :math:`r_k(x) \propto w_k
    N(x; \alpha m_k, V_k)`,

    .. math::
        \nabla_x \log p_t(x) = -\sum_k r_k V_k^{-1} (x - \alpha m_k), \qquad
        D(x, t) = \sum_k r_k \left( m_k + \alpha C_k V_k^{-1} (x - \alpha m_k) \right) .

    All examples share one mixture, or each example of a batch of B has its own.

    Arguments:
        weights: The weights, non-negative, with shape ``(K,)`` or ``(B, K)``; they are normalised.
        means: The means, with shape ``(K, *)`` or ``(B, K, *)``.
        covariances: The covariances of the flattened data, positive semi-definite, with shape
            ``(K, D, D)``, or ``(B or 1, K, D, D)`` if each example has its own mixture.
        sde: The forward process.
        labels: The class of each component, integers from 0 with shape ``(K,)``; None for a model
            without classes.

    Raises:
        InputError: If the shapes do not agree, or a covariance is not positive semi-definite.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> line = FullMixtureModel([1.0], [[1.0, 0.0]], torch.ones(1, 2, 2), VPSDE())
        >>> line.mean, line.covariance.trace().round()
        (tensor([1., 0.]), tensor(2.))
    """

    means: Tensor  # (B or 1, K, *)
    variances: Tensor  # (B or 1, K, D)
    bases: Tensor  # (B or 1, K, D, D)

    def __init__(
        self,
        weights: Tensor | Sequence,
        means: Tensor | Sequence,
        covariances: Tensor | Sequence,
        sde: SDE,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        means = floats(means)
        weights, covariances = floats(weights, means), floats(covariances, means)
        if covariances.ndim == 3:
            weights, means, covariances = weights[None], means[None], covariances[None]
        _check_shapes(weights, means, covariances)
        self.sde = sde
        variances, bases = _spectra(covariances)
        self.register_buffer("log_weights", torch.log(weights / weights.sum(1, keepdim=True)))
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("bases", bases)
        known = None if labels is None else check_labels(torch.as_tensor(labels), means.shape[1])
        self.register_buffer("labels", known, persistent=known is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.means.shape[2:])

    @property
    def mean(self) -> Tensor:
        """The mean of the mixture, ``(*)``, or ``(B, *)`` if each example has its own."""
        return _one(self._mean().reshape(-1, *self.shape))

    @property
    def covariance(self) -> Tensor:
        """The covariance of the mixture, ``(D, D)``, or ``(B, D, D)``."""
        away = self.means.flatten(2) - self._mean()
        parts = self._covariances() + away[..., None] * away[:, :, None]
        return _one((self.log_weights.exp()[..., None, None] * parts).sum(1))

    def _mean(self) -> Tensor:
        return (self.log_weights.exp()[..., None] * self.means.flatten(2)).sum(1, keepdim=True)

    def take(self, rows: Tensor) -> "FullMixtureModel":
        if len(self.means) == 1:
            return self
        parts = self.log_weights.exp(), self.means, self._covariances()
        weights, means, covariances = (p if len(p) == 1 else p[rows] for p in parts)
        return FullMixtureModel(weights, means, covariances, self.sde, self.labels)

    def _covariances(self) -> Tensor:
        return self.bases * self.variances[:, :, None] @ self.bases.mT

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, _, v = self._posterior(x, t, cond)
        return -self._mix(responsibilities, deviations / v, x)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, sigma, v = self._posterior(x, t, cond)
        return self._mix(responsibilities, deviations * sigma[..., None] / v, x)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, alpha, _, v = self._posterior(x, t, cond)
        gain = alpha[..., None] * self.variances.to(x) / v
        return self._means(responsibilities, x) + self._mix(responsibilities, gain * deviations, x)

    def _velocity_by_rates(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        deviations, responsibilities, alpha, sigma, v = self._posterior(x, t, cond)
        signal, noise = (
            one_or_each(rate(t), x).to(x) for rate in (self.sde.alpha_dot, self.sde.sigma_dot)
        )
        rates = (signal * alpha)[..., None] * self.variances.to(x) + (noise * sigma)[..., None]
        means = expand(self.sde.alpha_dot(t), x) * self._means(responsibilities, x)
        return means + self._mix(responsibilities, rates / v * deviations, x)

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
            n: The number of examples, positive; B if each example has its own mixture.
            t: The time.
            seed: Seed of the random streams. If None, a new one is drawn.
            label: The class of each, int64 ``(n,)``; -1, or None, for the whole mixture.
        """
        streams = Streams.of(seed, batch=check_count("n", n), device=self.means.device)
        self._check_rows(n)
        weights = self.log_weights if label is None else self._log_weights(label)
        u = streams.uniform((), Purpose.COMPONENT, dtype=torch.float64)
        k = (u[:, None] > weights.double().exp().cumsum(1)[:, :-1]).sum(1)
        z = streams.normal(self.shape, Purpose.DATA, dtype=self.means.dtype).flatten(1)
        rates = self.sde.alpha, self.sde.sigma
        alpha, sigma = (one_or_each(rate(as_time(t)), z).to(z) for rate in rates)
        means, variances, bases = (_pick(p, k) for p in (self.means, self.variances, self.bases))
        moved = bases @ (torch.sqrt(alpha**2 * variances + sigma**2) * z)[..., None]
        return (alpha * means.flatten(1) + moved[..., 0]).reshape(n, *self.shape)

    def _components(
        self, x: Tensor, t: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m_k in the eigenbases, log w_k N_k, alpha, sigma, and V_k there."""
        check_shape(x, self.means.shape[2:])
        self._check_rows(len(x))
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = (alpha[..., None] ** 2 * self.variances + sigma[..., None] ** 2).to(x)
        alpha, sigma = alpha.to(x), sigma.to(x)
        away = x.flatten(1).unsqueeze(1) - alpha[..., None] * self.means.flatten(2).to(x)
        deviations = (away[:, :, None] @ self.bases.to(x))[:, :, 0]
        log_normals = -0.5 * (deviations**2 / v + torch.log(2 * torch.pi * v)).sum(2)
        log_weights = self.log_weights if label is None else self._log_weights(label)
        return deviations, log_weights.to(x) + log_normals, alpha, sigma, v

    def _check_rows(self, count: int) -> None:
        if len(self.means) not in (1, count):
            raise InputError(
                f"The batch must have {len(self.means)} examples, one per mixture, got {count}; "
                "select mixtures with take(rows)."
            )

    def _means(self, responsibilities: Tensor, x: Tensor) -> Tensor:
        return (responsibilities[..., None] * self.means.flatten(2).to(x)).sum(1).reshape(x.shape)

    def _mix(self, responsibilities: Tensor, deviations: Tensor, x: Tensor) -> Tensor:
        weighted = responsibilities[..., None] * deviations
        return (self.bases.to(x) @ weighted[..., None])[..., 0].sum(1).reshape(x.shape)


def _one(values: Tensor) -> Tensor:
    """Returns a single row without its axis."""
    return values[0] if len(values) == 1 else values


def _pick(values: Tensor, k: Tensor) -> Tensor:
    """Returns component k of each example: of ``(B or 1, K, ...)``, ``(B, ...)``."""
    rows = torch.arange(len(k), device=k.device) if len(values) > 1 else torch.zeros_like(k)
    return values[rows, k]


def _check_shapes(weights: Tensor, means: Tensor, covariances: Tensor) -> None:
    if means.ndim < 3 or covariances.ndim != 4:
        raise InputError(
            "means and covariances must have shapes (K, *) and (K, D, D), or (B, K, *) and (B, "
            f"K, D, D), got {tuple(means.shape)} and {tuple(covariances.shape)}."
        )
    dimension = means.shape[2:].numel()
    count, components = means.shape[0], means.shape[1]
    fitting = [(n, components, dimension, dimension) for n in (1, count)]
    if weights.shape != (count, components) or covariances.shape not in fitting:
        raise InputError(
            "weights, means and covariances must have shapes (K,), (K, *) and (K, D, D), or (B, "
            f"K), (B, K, *) and (B or 1, K, D, D), got {tuple(weights.shape)}, "
            f"{tuple(means.shape)} and {tuple(covariances.shape)}."
        )
    if not (bool((weights >= 0).all()) and bool((weights.sum(1) > 0).all())):
        raise InputError(f"weights must be non-negative and not all 0, got {weights.tolist()}.")


def _spectra(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues and eigenbases; eigenvalues that rounding makes negative become 0."""
    variances, bases = torch.linalg.eigh(covariances)
    largest = variances.abs().amax(-1, keepdim=True)
    if bool((variances < -1e-5 * largest).any()) or not bool(variances.isfinite().all()):
        raise InputError(
            "covariances must be finite and positive semi-definite, got the eigenvalue "
            f"{variances.min():.4g}."
        )
    return variances.clamp(min=0), bases
