r"""Guidance by two models of one process, which extrapolates from the weak to the strong one.

.. math:: F_g = F_u + w (F_c - F_u)

for each view F: score, noise, denoised estimate and velocity. The scale w is 0 for the weak model
alone and 1 for the strong model alone, and each of these costs one network evaluation. With an
interval of the relative noise level :math:`\sigma / \alpha`, guidance applies inside the interval
and the strong model alone outside.

**The sampled law** is not the tilted density :math:`p_u^{1 - w} p_c^w`, whose noised versions have
a different score from :math:`F_g`. It also depends on the sampler. For the Gaussians
:math:`p_u = N(0, S^2)` and :math:`p_c = N(\mu, s^2)`, :math:`r = s / S < 1`, the probability flow
gives the variance :math:`S^{2(1 - w)} s^{2 w}` and the reverse SDE

.. math:: \text{mean } \mu \frac{1 - r^{2 w}}{1 - r^2}, \qquad
          \text{variance } S^2 \frac{r^2 - r^{4 w}}{(2 w - 1)(1 - r^2)} .

*Check:* ``tests/test_guided_laws.py``.

References:
    Ho and Salimans, *Classifier-free diffusion guidance*, 2022, https://arxiv.org/abs/2207.12598
    (equation 6; their w is this scale less 1).
    Karras et al., *Guiding a diffusion model with a bad version of itself*, 2024,
    https://arxiv.org/abs/2406.02507.
    Kynkäänniemi et al., *Applying guidance in a limited interval improves sample and distribution
    quality in diffusion models*, 2024, https://arxiv.org/abs/2404.07724.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.guidance.base import Guided, View, ask, check_interval, surely_nowhere
from scoresde.model import ScoreFunction, ScoreModel, check_model
from scoresde.nn.embedding import learned_none
from scoresde.passes import counted
from scoresde.sde import SDE
from scoresde.shapes import expand, is_none, none_like

Cond = dict[str, Tensor]


class PairGuidance(Guided):
    """Base class for guidance by a strong and a weak model.

    Arguments:
        model: The strong model.
        scale: 0 for the weak model, 1 for the strong one; one number, or ``(B,)``.
        interval: Lowest and highest guided level of sigma / alpha. If None, all levels are guided.

    Raises:
        InputError: If the scale is not finite, or the interval is not a pair of increasing
            non-negative numbers.
    """

    def __init__(
        self,
        model: ScoreFunction,
        scale: float | Tensor,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, scale)
        self.interval = check_interval(interval)

    @abstractmethod
    def strong(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Returns a view of the strong model."""

    @abstractmethod
    def weak(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Returns a view of the weak model."""

    @abstractmethod
    def both(
        self, view: View, x: Tensor, t: Tensor, cond: Cond, wanted: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns a view of the strong and of the weak model.

        Arguments:
            view: Requested view.
            x: States, with shape ``(B, *)``.
            t: Times, with shape ``()`` or ``(B,)``.
            cond: The conditions, each with shape ``(B, *)``.
            wanted: Masks of the examples that need the strong and the weak model, bool ``(B,)``
                each; the evaluation of other examples does not count.
        """

    def unguided(self, cond: Cond) -> Tensor | None:
        """Returns a mask of unconditional examples, bool ``(B,)``; None if there are none."""
        return None

    @property
    def jumps(self) -> tuple[float, ...]:
        """Times at which the guidance begins and ends, and the jumps of its parts."""
        log_snr = [-2 * math.log(end) for end in self.interval or () if 0 < end < math.inf]
        own = self.sde.time(torch.tensor(log_snr, dtype=torch.float64)).tolist()
        return tuple(sorted({*super().jumps, *own}))

    def combine(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        strong, weak, weight = self.pair(view, x, t, cond)
        # Exactly the weak model at 0 and the strong one at 1.
        return torch.lerp(weak, strong, expand(weight.to(x.device), x))

    def pair(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a view of the strong and of the weak model, and the weight, ``()`` or ``(B,)``.

        If no example needs one of the models, only the other is evaluated and takes its place. If
        this check would synchronise with a GPU, both are evaluated; the count is the same.
        """
        weight = self.weight(x, t, cond)
        needs = weight != 0, weight != 1
        if surely_nowhere(needs[1]):
            alone = self.strong(view, x, t, cond)
            return alone, alone, weight
        if surely_nowhere(needs[0]):
            alone = self.weak(view, x, t, cond)
            return alone, alone, weight
        wanted = needs[0].to(x.device).expand(len(x)), needs[1].to(x.device).expand(len(x))
        return (*self.both(view, x, t, cond, wanted), weight)

    def weight(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Returns the scale where guidance applies and 1 elsewhere, ``()`` or ``(B,)``."""
        weight = self.scale_of(x)
        if self.interval is not None:
            low, high = self.interval
            level = self.sde.sigma(t) / self.sde.alpha(t)
            weight = _one_unless((level >= low) & (level <= high), weight, x)
        rest = self.unguided(cond)
        return weight if rest is None else _one_unless(~rest, weight, x)


class ClassifierFreeGuidance(PairGuidance):
    r"""Guidance by a condition, with a model trained both with and without it.

    .. math:: F_g = F(x, \varnothing) + w \, (F(x, c) - F(x, \varnothing))

    The two evaluations are one call of the model on a doubled batch. Examples with the condition
    "none" (label -1) are not guided and take one evaluation.

    Arguments:
        model: Score function of the conditions, which include a value for "none".
        scale: Scale w, finite: 0 is unconditional, 1 conditional, above 1 guided. One number, or
            ``(B,)`` for each example.
        interval: Range (low, high) of the guided levels of sigma / alpha, ``0 <= low < high``.
            Outside it only the conditional model is evaluated. If None, all levels are guided.
        drop: Names of the conditions that the unconditional evaluation omits; every call must pass
            at least one of them.

    Raises:
        InputError: If an argument is out of range, or the scale requires a "none" that the network
            was not trained with; when called, if no condition to drop is passed.

    References:
        Ho and Salimans 2022, https://arxiv.org/abs/2207.12598 (equation 6, with w - 1 for w).
        Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724 (the interval).

    Example:
        >>> from scoresde import GaussianMixtureModel, VPSDE
        >>> two = GaussianMixtureModel([1, 1], [[-2.0], [2.0]], [0.5, 0.5], VPSDE(), labels=[0, 1])
        >>> guided = ClassifierFreeGuidance(two, scale=2.0)
        >>> x, label = torch.zeros(2, 1), torch.tensor([1, -1])
        >>> data = guided.denoise(x, torch.tensor(1.0), label=label)
        >>> [round(value) for value in data.flatten().tolist()]
        [4, 0]
    """

    def __init__(
        self,
        model: ScoreFunction,
        scale: float | Tensor,
        interval: Sequence[float] | None = None,
        drop: Sequence[str] = ("label",),
    ) -> None:
        super().__init__(model, scale, interval)
        self.drop = _check_drop(drop)
        if bool(((self.scale != 0) & (self.scale != 1)).any()):
            _check_learned(model, self.drop, self.scale)

    def taken(self, rows: Tensor, scale: Tensor) -> "ClassifierFreeGuidance":
        model = cast(ScoreFunction, self.model.take(rows))
        return ClassifierFreeGuidance(model, scale, self.interval, self.drop)

    def unguided(self, cond: Cond) -> Tensor | None:
        dropped = [is_none(values) for name, values in cond.items() if name in self.drop]
        if not dropped:
            raise InputError(
                f"{self.drop[0]} is required for classifier-free guidance, got "
                f"{', '.join(cond) or 'no condition'}; pass {self.drop[0]}=, a tensor with one "
                "row per example."
            )
        return torch.stack(dropped).all(0)

    def strong(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return ask(self.model, view, x, t, cond)

    def weak(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return ask(self.model, view, x, t, self._without(cond))

    def both(
        self, view: View, x: Tensor, t: Tensor, cond: Cond, wanted: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        none = self._without(cond)
        double = {name: torch.cat((values, none[name])) for name, values in cond.items()}
        model = self.model.take(torch.arange(len(x), device=x.device).repeat(2))
        with counted(torch.cat(wanted)):
            times = t.repeat(2) if t.ndim else t
            output = ask(model, view, torch.cat((x, x)), times, double)
        strong, weak = output.chunk(2)
        return strong, weak

    def _without(self, cond: Mapping[str, Tensor]) -> Cond:
        """Returns the conditions, with the dropped ones set to "none"."""
        return {k: none_like(c) if k in self.drop else c for k, c in cond.items()}


class Autoguidance(PairGuidance):
    r"""Guidance of a model by a weaker version of itself.

    .. math:: F_g = F_{weak} + w \, (F - F_{weak})

    The weak model has the same kinds of errors, but larger: a smaller network, a shorter training
    run, or another average of the weights. Both receive the same conditions.

    Arguments:
        model: The score function.
        weak: The weaker model, with an equal SDE.
        scale: Scale w, finite: 1 is the model itself, for one evaluation. One number, or ``(B,)``.
        interval: As for :class:`ClassifierFreeGuidance`.

    Raises:
        InputError: If an argument is out of range, or the two SDEs differ.

    References:
        Karras et al. 2024, https://arxiv.org/abs/2406.02507 (equation 4).
    """

    def __init__(
        self,
        model: ScoreFunction,
        weak: ScoreFunction,
        scale: float | Tensor,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, scale, interval)
        check_model(weak)
        if not _equal(model.sde, weak.sde):
            raise InputError(
                f"weak must be a model of the same SDE as model, {model.sde}, got {weak.sde}."
            )
        self.weaker = weak

    def taken(self, rows: Tensor, scale: Tensor) -> "Autoguidance":
        model, weak = (cast(ScoreFunction, part.take(rows)) for part in (self.model, self.weaker))
        return Autoguidance(model, weak, scale, self.interval)

    def strong(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return ask(self.model, view, x, t, cond)

    def weak(self, view: View, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return ask(self.weaker, view, x, t, cond)

    def both(
        self, view: View, x: Tensor, t: Tensor, cond: Cond, wanted: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        with counted(wanted[0]):
            strong = self.strong(view, x, t, cond)
        with counted(wanted[1]):
            return strong, self.weak(view, x, t, cond)


def _one_unless(acts: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Returns the weight where guidance applies and 1 elsewhere."""
    if acts.ndim == 0 and acts.device.type == "cpu":
        return weight if bool(acts) else torch.ones((), dtype=weight.dtype)
    return torch.where(acts.to(x.device), weight.to(x.device), 1.0)


def _check_drop(drop: Sequence[str]) -> tuple[str, ...]:
    names = (drop,) if isinstance(drop, str) else tuple(drop)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"drop must contain the name of at least one condition, got {drop!r}; pass ('label',) "
            "for classes."
        )
    return names


def _check_learned(model: ScoreFunction, drop: Sequence[str], scale: Tensor) -> None:
    """Checks that the networks of a model were trained without the dropped conditions."""
    for part in model.modules():
        if not isinstance(part, ScoreModel):
            continue
        taken = [name for name in drop if part.takes(name)]
        if not taken:
            raise InputError(
                f"drop must contain a condition of the network, got {list(drop)}; build the "
                "network with classes= or conditions=."
            )
        for name in taken:
            if not learned_none(part.network, name):
                raise InputError(
                    f"scale must be 0 or 1 for a network that was never trained without {name}, "
                    f"got {scale.tolist()}; train it with condition_dropout=0.1."
                )


def _equal(one: SDE, two: SDE) -> bool:
    """Returns whether two processes have the same coefficients."""
    times = torch.linspace(0, 1, 33, dtype=torch.float64)
    return torch.equal(one.alpha(times), two.alpha(times)) and torch.equal(
        one.sigma(times), two.sigma(times)
    )
