"""The base class of exact models of mixtures of Gaussians."""

from abc import abstractmethod

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.model.base import ScoreFunction
from scoresde.passes import count_pass
from scoresde.sde import as_time


class Mixture(ScoreFunction):
    """Base class for exact models of mixtures of Gaussians, whose components may have classes.

    Subclasses implement :meth:`_components`.
    """

    log_weights: Tensor
    labels: Tensor | None

    @abstractmethod
    def _components(
        self, x: Tensor, t: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m_k ``(B, K, D)``, log w_k N_k ``(B, K)``, and alpha, sigma, v_k."""

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
            t: Time, common to all states or one per state.
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
        members = self._members(torch.arange(self.classes, device=self.log_weights.device))
        within = joint[:, None] + torch.where(members, 0.0, -torch.inf).to(joint)
        return torch.logsumexp(within, 2) - torch.logsumexp(joint, 1, keepdim=True)

    def _members(self, label: Tensor) -> Tensor:
        """Returns which components a class has, bool ``(B, K)``; all of them for -1."""
        if self.labels is None:
            raise InputError(
                "label requires a mixture with classes; build the mixture with labels=."
            )
        if label.ndim != 1 or label.is_floating_point() or label.dtype == torch.bool:
            raise InputError(
                f"label must be an integer tensor of shape (B,), got {label.dtype} of shape "
                f"{tuple(label.shape)}."
            )
        return (label[:, None] == self.labels) | (label[:, None] == -1)

    def _log_weights(self, label: Tensor) -> Tensor:
        """Returns the logarithms of the weights within each example's class, ``(B, K)``."""
        members = self._members(label.to(self.log_weights.device))
        # Not checked on a GPU, where the check would synchronise at every evaluation. A class
        # without components then gives values that are not finite.
        if label.device.type == "cpu" and not bool(members.any(1).all()):
            raise InputError(
                f"label must be -1 or a class from 0 to {self.classes - 1}, got "
                f"{label.unique().tolist()}."
            )
        return torch.log_softmax(self.log_weights.masked_fill(~members, -torch.inf), 1)

    def _posterior(
        self, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns :meth:`_components` with responsibilities; this counts as one pass."""
        count_pass(len(x))
        parts = self._components(x, as_time(t), cond.get("label"))
        deviations, joint, alpha, sigma, v = parts
        return deviations, torch.softmax(joint, 1), alpha, sigma, v


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Returns the classes of ``count`` components, int64 ``(count,)``.

    Raises:
        InputError: If they are not integers from 0, with every class up to the largest present.
    """
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if labels.shape != (count,) or not whole or int(labels.min()) < 0:
        raise InputError(
            f"labels must be {count} non-negative integers, one per component, got "
            f"{labels.tolist()}."
        )
    classes = torch.arange(int(labels.max()) + 1)
    if not bool(torch.isin(classes, labels.cpu()).all()):
        raise InputError(
            f"labels must contain every class from 0 to the largest, got {labels.tolist()}."
        )
    return labels.to(torch.int64)
