r"""Guidance with a correction of the denoised estimate, for each example separately.

A large scale moves the denoised estimate out of the range of the data. :class:`Rescaled` shrinks
it to the spread of the strong model's estimate. :class:`Projected` (APG) removes or shortens the
part of the guidance that is parallel to the estimate. Both wrap a guidance and apply where it
applies.

The published forms act on the output of the network, which may be the noise or v; here they act on
the denoised estimate D, regardless of what the network returns. For :class:`Rescaled` this gives a
different model: the results in the noise and in D differ by more than half of the change itself.
The laws that these models sample are not known.

CFG++ is not included. Its step equals a step of plain guidance with a scale that grows with the
number of steps. In the limit of many steps all samples become one point.

References:
    Lin et al., *Common diffusion noise schedules and sample steps are flawed*, 2023,
    https://arxiv.org/abs/2305.08891 (section 3.4).
    Sadat, Hilliges and Weber, *Eliminating oversaturation and artifacts of high guidance scales in
    diffusion models*, 2024, https://arxiv.org/abs/2410.02416 (APG; equations 5 to 8).
    Chung et al., *CFG++*, 2024, https://arxiv.org/abs/2406.08070.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.guidance.base import View
from scoresde.guidance.clipping import ChangedData
from scoresde.guidance.pairs import PairGuidance
from scoresde.model import ScoreFunction
from scoresde.shapes import expand

_LEAST = 16  # dimensions over which the spread of one example means something


class ChangedGuidance(ChangedData):
    """Base class for changes of a guidance by two models.

    Arguments:
        guide: The guidance.

    Raises:
        InputError: If ``guide`` is not a guidance by two models.
    """

    model: PairGuidance

    def __init__(self, guide: PairGuidance) -> None:
        if not isinstance(guide, PairGuidance):
            raise InputError(
                "guide must be a PairGuidance such as ClassifierFreeGuidance or Autoguidance, "
                f"got {type(guide).__name__}; on the command line, set guidance=[cfg,apg] for "
                "example."
            )
        super().__init__(guide)

    @abstractmethod
    def mix(self, strong: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        """Returns the guided estimate from the strong and the weak one, ``(B, *)``.

        Arguments:
            strong: Denoised estimates of the strong model.
            weak: Denoised estimates of the weak model; equal to ``strong`` where only one is
                needed.
            weight: Scale where guidance applies and 1 elsewhere; broadcasts to the estimates.
        """

    def change(self, data: Tensor) -> Tensor:
        return data  # a single model has no guidance to change

    def parts(
        self, view: View, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[list[Tensor], Callable[..., Tensor]]:
        strong, weak, weight = self.model.pair(view, x, t, cond)
        return [strong, weak], lambda s, u: self.mix(s, u, expand(weight.to(x.device), x))


class Rescaled(ChangedGuidance):
    r"""A guidance whose estimate is rescaled towards the spread of the strong model's estimate.

    .. math:: D' = \phi \, \frac{\operatorname{std} D_c}{\operatorname{std} D_g} \, D_g
              + (1 - \phi) \, D_g ,

    with the standard deviation over the values of one example.

    Arguments:
        guide: The guidance.
        factor: Weight :math:`\phi`, in [0, 1]: 0 is the unchanged guidance; 0.7 is usual.

    Raises:
        InputError: If the factor is outside [0, 1]; when called, if an example has fewer than 16
            values.

    References:
        Lin et al. 2023, https://arxiv.org/abs/2305.08891 (equations 15 and 16).
    """

    def __init__(self, guide: PairGuidance, factor: float) -> None:
        super().__init__(guide)
        if not 0 <= factor <= 1:
            raise InputError(f"factor must be in [0, 1], got {factor}; a typical value is 0.7.")
        self.factor = factor

    def around(self, model: ScoreFunction) -> "Rescaled":
        assert isinstance(model, PairGuidance)
        return Rescaled(model, self.factor)

    def mix(self, strong: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        if strong[0].numel() < _LEAST:
            raise InputError(
                f"Rescaled requires examples of at least {_LEAST} values, got "
                f"{strong[0].numel()}, because the spread of fewer is meaningless; use the "
                "guidance alone."
            )
        guided = torch.lerp(weak, strong, weight)
        spread, wide = (part.flatten(1).std(1, correction=0) for part in (strong, guided))
        ratio = torch.where(wide > 0, spread / wide, 1.0)
        return expand(self.factor * ratio + (1 - self.factor), guided) * guided


class Projected(ChangedGuidance):
    r"""Adaptive projected guidance (APG), with less guidance parallel to the estimate.

    With :math:`\Delta = D_c - D_u`, shortened to the length ``norm`` where it is longer, and split
    into :math:`\Delta_\parallel` along :math:`D_c` and the rest,

    .. math:: D' = D_c + (w - 1) (\Delta_\perp + \eta \, \Delta_\parallel) .

    The data should be approximately centred; otherwise the direction of :math:`D_c` is that of
    their mean. The published momentum is omitted, since it is not a function of the state and the
    time.

    Arguments:
        guide: The guidance.
        eta: Fraction :math:`\eta` of the parallel part that is kept, finite: 1 keeps all of it.
        norm: Largest length of :math:`\Delta`, positive; no limit if infinite.

    Raises:
        InputError: If an argument is out of range.

    References:
        Sadat et al. 2024, https://arxiv.org/abs/2410.02416 (equations 5 to 8).
    """

    def __init__(self, guide: PairGuidance, eta: float = 0.0, norm: float = math.inf) -> None:
        super().__init__(guide)
        if not math.isfinite(eta):
            raise InputError(f"eta must be finite, got {eta}; pass 0 to remove the parallel part.")
        if not norm > 0:
            raise InputError(f"norm must be positive, got {norm}; pass math.inf for no limit.")
        self.eta, self.norm = eta, norm

    def around(self, model: ScoreFunction) -> "Projected":
        assert isinstance(model, PairGuidance)
        return Projected(model, self.eta, self.norm)

    def mix(self, strong: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        gap = strong - weak
        if self.norm < math.inf:
            gap = gap * expand((self.norm / _length(gap)).clamp(max=1.0), gap)
        along = strong / expand(_length(strong), strong)
        parallel = expand((gap * along).flatten(1).sum(1), along) * along
        return strong + (weight - 1) * (gap + (self.eta - 1) * parallel)


def _length(x: Tensor) -> Tensor:
    """Returns the norms of examples, ``(B,)``, above 0."""
    return x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
