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

    **Classes.** If each component has a class, the model is conditional: with the condition
    ``label`` only the components of that class count, with weights that add up to 1, and

    .. math:: p(c \mid x_t) = \sum_{k \in c} r_k(x_t) .

    Arguments:
        weights: The weights, positive, with shape ``(K,)``; they are normalised.
        means: The means, with shape ``(K, *)``.
        stds: The standard deviations, positive, with shape ``(K,)``.
        sde: The forward process.
        labels: The class of each component, whole numbers from 0 with shape ``(K,)``, each up to
            the largest at least once; None for a model without classes.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> two = GaussianMixtureModel([1, 1], [[-2.0], [2.0]], [0.5, 0.5], VPSDE(), labels=[0, 1])
        >>> two.class_log_prob(torch.tensor([[-2.0]]), 0.1).exp().round(decimals=3)
        tensor([[1., 0.]])
    """

    log_weights: Tensor
    means: Tensor
    stds: Tensor
    labels: Tensor | None

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
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and stds "
                f"{tuple(stds.shape)} must have shapes (K,), (K, *) and (K,)."
            )
        if not (bool((weights > 0).all()) and bool((stds > 0).all())):
            raise InputError("A weight or a std of the mixture is not positive; make it positive.")
        self.sde = sde
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        known = None if labels is None else _check_labels(torch.as_tensor(labels), len(means))
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

    def takes(self, name: str) -> bool:
        return name == "label" and self.labels is not None

    @property
    def classes(self) -> int:
        """The number of classes; 0 if the components have none."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0, label: Tensor | None = None) -> Tensor:
        """Returns the log-density of the marginal at ``t`` in nats: ``(B, *)`` to ``(B,)``.

        Arguments:
            x: States, with shape ``(B, *)``.
            t: Their time, or one for each.
            label: The class of each, int64 ``(B,)``; -1, or None, for the whole mixture.
        """
        _, joint, _, _, _ = self._components(x, as_time(t), label)
        return torch.logsumexp(joint, 1)

    def class_log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        r"""Returns :math:`\log p(c \mid x_t)` of every class, ``(B, C)``, in nats.

        Raises:
            InputError: If the components have no classes.
        """
        _, joint, _, _, _ = self._components(x, as_time(t), None)
        members = self._members(torch.arange(self.classes, device=self.means.device))
        within = joint[:, None] + torch.where(members, 0.0, -torch.inf).to(joint)
        return torch.logsumexp(within, 2) - torch.logsumexp(joint, 1, keepdim=True)

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

    def _members(self, label: Tensor) -> Tensor:
        """Returns which components a class has, bool ``(B, K)``; all of them for -1."""
        if self.labels is None:
            raise InputError("label requires classes; build the mixture with labels=.")
        if label.ndim != 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise InputError(
                f"label must have whole numbers of shape (B,), got {tuple(label.shape)} of "
                f"{label.dtype}."
            )
        return (label[:, None] == self.labels) | (label[:, None] == -1)

    def _log_weights(self, label: Tensor) -> Tensor:
        """Returns the logarithms of the weights within each example's class, ``(B, K)``."""
        members = self._members(label.to(self.means.device))
        # On a GPU the host would wait for this at every pass; there a class without components
        # gives values that are not finite.
        if label.device.type == "cpu" and not bool(members.any(1).all()):
            raise InputError(
                f"label must be -1 or a class from 0 to {self.classes - 1}, got "
                f"{label.unique().tolist()}."
            )
        return torch.log_softmax(self.log_weights.masked_fill(~members, -torch.inf), 1)

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

    def _posterior(
        self, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`_components` does, with responsibilities: this is one pass."""
        count_pass(len(x))
        parts = self._components(x, as_time(t), cond.get("label"))
        deviations, joint, alpha, sigma, v = parts
        return deviations, torch.softmax(joint, 1), alpha, sigma, v

    @staticmethod
    def _mix(weights: Tensor, deviations: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", weights, deviations).reshape(x.shape)


def _check_labels(labels: Tensor, count: int) -> Tensor:
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.shape != (count,) or not whole or int(labels.min()) < 0:
        raise InputError(
            f"labels must be {count} whole numbers from 0, one for each component, got "
            f"{labels.tolist()}."
        )
    classes = torch.arange(int(labels.max()) + 1)
    if not bool(torch.isin(classes, labels.cpu()).all()):
        raise InputError(f"labels must use every class up to the largest, got {labels.tolist()}.")
    return labels.to(torch.int64)
