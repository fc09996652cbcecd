"""The loss of a classifier of noised examples."""

from dataclasses import dataclass, field

from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.model import Classifier, Trainable, check_model
from scoresde.sde import Interpolant
from scoresde.times import LogNormalTimes, Times


@dataclass(frozen=True)
class CrossEntropy(Loss):
    r"""The cross entropy of the class, :math:`-\log p(c \mid x_t)`, at noised data.

    Every time has the weight 1, so the density of ``times`` determines the weight of the noise
    levels. Examples without a class (label -1) have the loss 0.

    Arguments:
        times: The density of training times; the default includes the largest noise, where the
            classes cannot be distinguished.
        eps: The smallest time, in [0, 1); None takes the default of the SDE.

    References:
        Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233 (section 4).

    Example:
        >>> import torch
        >>> from scoresde import VPSDE
        >>> from scoresde.nn import MLP
        >>> classifier = Classifier(MLP(2, width=8, outputs=3), VPSDE())
        >>> x, label = torch.zeros(2, 2), torch.tensor([2, -1])
        >>> CrossEntropy()(classifier, x, seed=0, label=label).detach().abs()
        tensor([1.0986, 0.0000])
    """

    times: Times = field(default_factory=lambda: LogNormalTimes(0.0, 2.0, tail=0.1))
    eps: float | None = None

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the cross entropy of each example in nats; arguments as for the base.

        The part ``accuracy`` is 1 where the most likely class is the true one.

        Raises:
            InputError: If the label is missing, or shapes disagree.
        """
        self.check(model)
        assert isinstance(model, Classifier)
        label = cond.get("label")
        if label is None or label.shape != x.shape[:1]:
            raise InputError(
                f"label must have shape ({len(x)},), one class per example, got "
                f"{None if label is None else tuple(label.shape)}; use data with classes."
            )
        sde, eps = model.sde, self.first_time(model.sde)
        drawn = given.draw(sde, x, self.times, eps)
        found = model(sde.perturb(x, drawn.t, drawn.noise), drawn.t)
        known = label >= 0
        own = found.gather(1, label.clamp(min=0)[:, None])[:, 0]
        right = (found.argmax(1) == label).to(x)
        return LossTerms(-own.where(known, own.new_zeros(())), {"accuracy": right})

    def check(self, model: Trainable) -> None:
        check_model(model, Classifier)
        self.first_time(model.process)

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)
