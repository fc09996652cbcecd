r"""Flow matching, the squared error of the velocity.

For an example :math:`x_0`, its other end :math:`x_1` (noise, on an SDE) and a time, the velocity
of a model at :math:`x_t = \alpha x_0 + \sigma x_1` is compared with that of the path,

.. math:: L = \frac1D \lVert \hat u(x_t, t) - (\alpha' x_0 + \sigma' x_1) \rVert^2 .

**As a weighted error of the noise.** Since :math:`x_t = \alpha D + \sigma \hat z`, the errors of
data and noise are related by :math:`\alpha (D - x_0) = -\sigma (\hat z - z)`, and from
:math:`\hat u = \alpha' D + \sigma' \hat z` follows

.. math:: \hat u - u = \frac{W}{\alpha} (\hat z - z) = -\frac{W}{\sigma} (D - x_0), \qquad
          W = \alpha \sigma' - \sigma \alpha' .

It is the error of the noise with the weight :math:`W^2 / \alpha^2 = (g^2 / 2 \sigma)^2`
(:class:`~scoresde.loss.VelocityWeighting`), and that of the data with :math:`W^2 / \sigma^2`. On
rectified flow W is 1, and the weights are :math:`1 / (1 - t)^2` and :math:`1 / t^2`. The velocity
itself is finite at both ends; each weight has a pole at one of them.

References:
    Lipman et al., *Flow matching for generative modeling*, 2023,
    https://arxiv.org/abs/2210.02747 (equation 9).
    Liu, Gong and Liu, *Flow straight and fast*, 2023, https://arxiv.org/abs/2209.03003
    (equation 1).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.base import Given, Loss, LossTerms
from scoresde.loss.coupling import Coupling, Independent
from scoresde.model import Model, Trainable, check_model
from scoresde.sde import SDE, Interpolant
from scoresde.shapes import expand
from scoresde.times import Times, UniformTimes

_SOURCE = "source"  # the condition that holds the other end of each example's path


@dataclass(frozen=True)
class FlowMatching(Loss):
    r"""Flow matching, on any process without noise between its ends (:math:`\gamma = 0`).

    The other ends are noise, or the result of ``coupling``, or the condition ``source`` of the
    data, such as that of :meth:`scoresde.train.Reflow.pairs`. From coupled ends a model learns the
    velocity but not the score: see :mod:`scoresde.loss.coupling`.

    Arguments:
        times: The density of training times.
        coupling: The pairing of noise and examples; independent by default.
        eps: The smallest time, in [0, 1). If None, the default of the process is used.

    Example:
        >>> from scoresde import RectifiedFlow, ScoreModel, VelocityParametrisation
        >>> flow = ScoreModel(lambda x, c: 0 * x, RectifiedFlow(), VelocityParametrisation())
        >>> x, noise = torch.ones(1, 2), torch.tensor([[0.0, 3.0]])
        >>> FlowMatching()(flow, x, 0.3, noise)  # the mean of (0 - 1)^2 and (3 - 1)^2
        tensor([2.5000])
    """

    times: Times = field(default_factory=UniformTimes)
    coupling: Coupling = field(default_factory=Independent)
    eps: float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.times, Times) and isinstance(self.coupling, Coupling)):
            raise InputError(
                "times and coupling must be a Times such as UniformTimes() and a Coupling such as "
                f"Independent(), got {self.times} and {self.coupling}."
            )

    def evaluate(self, model: Trainable, x: Tensor, given: Given, **cond: Tensor) -> LossTerms:
        """Returns the squared error of each example's velocity; arguments as for the base.

        Drawn times have the weight of their density. The part ``velocity_error`` is the unweighted
        error.

        Raises:
            InputError: If the loss does not apply to the model, or shapes disagree.
        """
        self.check(model)
        assert isinstance(model, Model)
        process, eps = model.process, self.first_time(model.process)
        drawn = given.draw(process, x, self.times, eps)
        known = {name: c for name, c in cond.items() if name != _SOURCE or model.takes(name)}
        if _SOURCE in cond:
            end = self._given(cond[_SOURCE], x)
        else:
            end = self._coupled(model)(x, drawn.noise, known, given.own)
        state = process.interpolate(x, end, drawn.t)
        rates = process.alpha_dot(drawn.t), process.sigma_dot(drawn.t)
        target = expand(rates[0], x) * x + expand(rates[1], x) * end
        error = model.velocity(state, drawn.t, **known) - target
        mean = error.square().flatten(1).mean(1)
        weight = torch.as_tensor(drawn.weight).to(x)
        return LossTerms(weight * mean, {"velocity_error": mean.detach()})

    def _given(self, source: Tensor, x: Tensor) -> Tensor:
        if source.shape != x.shape or not isinstance(self.coupling, Independent):
            raise InputError(
                f"source must have the shape of the examples, {tuple(x.shape)}, and requires "
                f"coupling=Independent(), got {tuple(source.shape)} and {self.coupling}."
            )
        return source.to(x)

    def _coupled(self, model: Model) -> Coupling:
        if self.coupling.keeps_noise and not isinstance(model.process, SDE):
            raise InputError(
                f"source must be a tensor for {model.process}, which does not end in noise, got "
                "None; use data with the condition source, or coupling=SourceSamples(samples)."
            )
        return self.coupling

    def select(self, model: Trainable, cond: Mapping[str, Tensor]) -> dict[str, Any]:
        chosen = model.select(cond)
        return chosen if _SOURCE not in cond else {**chosen, _SOURCE: model.state(cond[_SOURCE])}

    def cautions(self, model: Trainable, given: Collection[str]) -> list[str]:
        coupled = _SOURCE in given or not isinstance(self.coupling, Independent)
        if not coupled or not isinstance(model.process, SDE):
            return []
        return [
            "The noise is coupled with the examples, so the velocity is learned, but not the "
            "score: use deterministic samplers and Likelihood. Stochastic samplers and "
            "VariationalBound are biased."
        ]

    def check(self, model: Trainable) -> None:
        check_model(model, Model)
        process = model.process
        self.first_time(process)
        if isinstance(process, SDE) and not self.coupling.keeps_noise:
            raise InputError(
                f"coupling must return normal noise for {process}, whose prior is normal, got "
                f"{self.coupling}; use a process that is not an SDE."
            )
        if not isinstance(process, SDE) and float(process.gamma(torch.tensor(0.5))) != 0:
            raise InputError(
                f"process must have no noise between its ends (gamma = 0), got {process}, whose "
                "velocity is infinite at the ends."
            )

    def first_time(self, process: Interpolant) -> float:
        return process.check_eps(process.cutoffs.training if self.eps is None else self.eps)
