r"""Guidance by a classifier trained on noised data.

With :math:`w` times the gradient of a classifier added to the score,

.. math::
    s_g = s + w \, \nabla_x \log p_t(c \mid x), \qquad
    \hat z_g = \hat z - w \, \sigma \, \nabla_x \log p_t(c \mid x), \qquad
    D_g = D + w \, \frac{\sigma^2}{\alpha} \nabla_x \log p_t(c \mid x) .

By Bayes' rule the gradient is the difference of the conditional and the unconditional score: with
the exact classifier this is classifier-free guidance. The classifier must be trained at every
noise level.

At zero SNR (alpha = 0 at t = 1) the gradient vanishes and :math:`D_g` is 0/0. Where
:math:`\alpha / \sigma < 10^{-3}` the classifier is therefore evaluated at the nearest earlier time
above this threshold. The shift of the denoised estimate is that of this time, with an error of the
order of 1e-3.

References:
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 14).
    Dhariwal and Nichol, *Diffusion models beat GANs on image synthesis*, 2021,
    https://arxiv.org/abs/2105.05233 (section 4.1).
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.guidance.base import Guided, View, ask, surely_nowhere
from scoresde.model import ScoreFunction
from scoresde.passes import count_products, counted
from scoresde.shapes import expand, none_like

_LEAST_SNR = 1e-3  # alpha / sigma below which the classifier is evaluated earlier

Cond = dict[str, Tensor]


class ClassifierGuidance(Guided):
    r"""Guidance by the gradient of a classifier.

    .. math:: D_g = D + w \, \frac{\sigma^2}{\alpha} \nabla_x \log p_t(c \mid x)

    The condition ``label`` contains the class c of each example; examples with -1 are not guided.
    A model that takes labels is evaluated without one. The backward pass of the classifier counts
    as a product with a transposed Jacobian (``vjps``). Its forward pass counts if it reports one.

    Arguments:
        model: The score function.
        classifier: ``classifier(x, t)`` returns :math:`\log p(c \mid x_t)` in nats, ``(B, C)``,
            differentiable in x, such as a :class:`~scoresde.model.Classifier` or
            ``GaussianMixtureModel.class_log_prob``.
        scale: Scale w, finite: 0 is the model itself. One number, or ``(B,)``.

    Raises:
        InputError: If an argument is out of range; when called, if ``label`` is missing.

    References:
        Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233 (algorithm 2).

    Example:
        >>> from scoresde import GaussianMixtureModel, VPSDE
        >>> two = GaussianMixtureModel([1, 1], [[-2.0], [2.0]], [0.5, 0.5], VPSDE(), labels=[0, 1])
        >>> guided = ClassifierGuidance(two, two.class_log_prob, scale=2.0)
        >>> x, label = torch.zeros(2, 1), torch.tensor([1, -1])
        >>> data = guided.denoise(x, torch.tensor(1.0), label=label)
        >>> [round(value) for value in data.flatten().tolist()]
        [4, 0]
    """

    def __init__(
        self,
        model: ScoreFunction,
        classifier: Callable[[Tensor, Tensor], Tensor],
        scale: float | Tensor,
    ) -> None:
        super().__init__(model, scale)
        # A module without forward, such as a ScoreModel, is callable, but fails when called.
        idle = isinstance(classifier, nn.Module) and type(classifier).forward is nn.Module.forward
        if idle or not callable(classifier):
            raise InputError(
                "classifier must be a Classifier or a callable (x, t) -> log p(c | x_t) of shape "
                f"(B, C), got {type(classifier).__name__}; train one with "
                "+experiment=digits_classifier."
            )
        self.classifier = classifier

    def takes(self, name: str) -> bool:
        return name == "label" or self.model.takes(name)

    def taken(self, rows: Tensor, scale: Tensor) -> "ClassifierGuidance":
        model = cast(ScoreFunction, self.model.take(rows))
        return ClassifierGuidance(model, self.classifier, scale)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return ScoreFunction.velocity(self, x, t, **cond)  # by the noise or the denoised estimate

    def combine(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        label = _label(cond, x)
        output = ask(self.model, view, x, t, self._without(cond))
        guided = (label >= 0) & (self.scale_of(x) != 0).to(label.device)
        if surely_nowhere(guided):
            return output
        weight = torch.where(guided, self.scale.to(label.device), 0.0)
        shift = self._shift(x, t, label, guided)
        gain = weight.to(x.device) * self._gain(view, t).to(x.device)
        return output + expand(gain, x) * shift

    def _without(self, cond: Cond) -> Cond:
        """Returns the model's conditions, with the label, if it takes one, set to "no class"."""
        known = {k: c for k, c in cond.items() if k != "label"}
        return {**known, "label": none_like(cond["label"])} if self.model.takes("label") else known

    def _shift(self, x: Tensor, t: Tensor, label: Tensor, guided: Tensor) -> Tensor:
        """Returns the shift of the denoised estimate for a scale of 1; 0 without a class."""
        if self.sde.zero_snr:
            latest = self.sde.time(torch.tensor(2 * math.log(_LEAST_SNR), dtype=t.dtype))
            t = torch.minimum(t, latest.to(t.device))

        def total(y: Tensor) -> Tensor:
            found = self._log_probs(y, t, label)
            return torch.where(guided.to(found.device), found, 0.0).sum()

        # The gradient of the sum, so an example's gradient does not depend on the batch. It works
        # where the caller keeps no gradients, and is differentiable where the caller
        # differentiates.
        with counted(guided.to(x.device)):
            count_products(len(x))
            gradient = torch.func.grad(total)(x)
        return expand(self.sde.sigma(t) ** 2 / self.sde.alpha(t), x) * gradient

    def _log_probs(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Returns the log-probability of each example's class, ``(B,)``."""
        every = self.classifier(x, t)
        if every.ndim != 2 or len(every) != len(x):
            raise InputError(
                f"classifier must return log p(c | x_t) of shape ({len(x)}, C), got "
                f"{tuple(every.shape)}."
            )
        classes = every.shape[1]
        # On a GPU this check would synchronise; there the lookup fails on a wrong class.
        if label.device.type == "cpu" and not bool((label < classes).all()):
            raise InputError(
                f"label must be -1 or a class from 0 to {classes - 1}, got "
                f"{label.unique().tolist()}."
            )
        return every.gather(1, label.clamp(min=0).to(every.device)[:, None])[:, 0]

    def _gain(self, view: View, t: Tensor) -> Tensor:
        """Returns the factor from a shift of the denoised estimate to the shift of a view."""
        ratio = self.sde.alpha(t) / self.sde.sigma(t)
        return {
            "denoise": torch.ones_like(ratio),
            "noise": -ratio,
            "score": ratio / self.sde.sigma(t),
        }[view]


def _label(cond: Cond, x: Tensor) -> Tensor:
    """Returns the classes, int64 ``(B,)``.

    Raises:
        InputError: If the classes are missing, or are not one integer for each example.
    """
    label = cond.get("label")
    if label is None:
        raise InputError(
            f"label must be an integer tensor of shape ({len(x)},) for classifier guidance, got "
            "None; pass label=."
        )
    whole = not label.is_floating_point() and label.dtype != torch.bool
    if label.shape != x.shape[:1] or not whole:
        raise InputError(
            f"label must be an integer tensor of shape ({len(x)},), got {label.dtype} of shape "
            f"{tuple(label.shape)}."
        )
    return label.long()
