r"""Guidance whose excess is taken back: on the denoised estimate, for each example on its own.

A large scale moves the denoised estimate out of the range of the data. :class:`Rescaled` shrinks
it to the spread of the strong model's; :class:`Projected` (APG) leaves out, or shortens, the part
of the guidance that points along it. Both wrap a guidance, and act where it acts.

The published forms act on the output of the network, which may be the noise or v; here they act
on the denoised estimate D, whatever the network returns. For the rescaled one that is another
model: in the noise and in D the results differ by more than half of the change itself. Nothing is
known of the laws that these sample.

CFG++ is not here: a step of it equals one of plain guidance with a scale that grows with the
number of steps, so that with more and more steps all samples become one point.

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
        InputError: If it is not a guidance by two models.
    """

    model: PairGuidance

    def __init__(self, guide: PairGuidance) -> None:
        if not isinstance(guide, PairGuidance):
            raise InputError(
                f"guide must be a ClassifierFreeGuidance or an Autoguidance, got "
                f"{type(guide).__name__}; guide the model first, as by guidance=[cfg,apg]."
            )
        super().__init__(guide)

    @abstractmethod
    def mix(self, strong: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        """Returns the guided estimate of the strong and the weak one, ``(B, *)``.

        Arguments:
            strong: The denoised estimates of the strong model.
            weak: Those of the weak one; the same where only one of them is needed.
            weight: The scale where the guidance acts and 1 elsewhere; it broadcasts to them.
        """

    def change(self, data: Tensor) -> Tensor:
        return data  # of a single model there is no guidance to change

    def parts(
        self, view: View, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[list[Tensor], Callable[..., Tensor]]:
        strong, weak, weight = self.model.pair(view, x, t, cond)
        return [strong, weak], lambda s, u: self.mix(s, u, expand(weight.to(x.device), x))


class Rescaled(ChangedGuidance):
    r"""A guidance whose estimate is brought towards the spread of the strong model's.

    .. math:: D' = \phi \, \frac{\operatorname{std} D_c}{\operatorname{std} D_g} \, D_g
              + (1 - \phi) \, D_g ,

    with the standard deviation over the values of one example.

    Arguments:
        guide: The guidance.
        factor: The share :math:`\phi`, in [0, 1]: 0 is the guidance as it is; 0.7 is usual.

    Raises:
        InputError: If the factor is outside [0, 1]; when called, if an example has less than 16
            values.

    References:
        Lin et al. 2023, https://arxiv.org/abs/2305.08891 (equations 15 and 16).
    """

    def __init__(self, guide: PairGuidance, factor: float) -> None:
        super().__init__(guide)
        if not 0 <= factor <= 1:
            raise InputError(f"factor must be in [0, 1], got {factor}; 0.7 is usual.")
        self.factor = factor

    def around(self, model: ScoreFunction) -> "Rescaled":
        assert isinstance(model, PairGuidance)
        return Rescaled(model, self.factor)

    def mix(self, strong: Tensor, weak: Tensor, weight: Tensor) -> Tensor:
        if strong[0].numel() < _LEAST:
            raise InputError(
                f"Rescaled requires examples of at least {_LEAST} values, got "
                f"{strong[0].numel()}: the spread of fewer says nothing; use the guidance alone."
            )
        guided = torch.lerp(weak, strong, weight)
        spread, wide = (part.flatten(1).std(1, correction=0) for part in (strong, guided))
        ratio = torch.where(wide > 0, spread / wide, 1.0)
        return expand(self.factor * ratio + (1 - self.factor), guided) * guided


class Projected(ChangedGuidance):
    r"""Adaptive projected guidance (APG): less of the guidance along the estimate itself.

    With :math:`\Delta = D_c - D_u`, shortened to the length ``norm`` where it is longer, and split
    into :math:`\Delta_\parallel` along :math:`D_c` and the rest,

    .. math:: D' = D_c + (w - 1) (\Delta_\perp + \eta \, \Delta_\parallel) .

    The data should be about centred: of others the direction of :math:`D_c` is that of their
    mean. The published momentum is left out, since it is not a function of the state and the time.

    Arguments:
        guide: The guidance.
        eta: The share :math:`\eta` of the parallel part that is kept, finite: 1 keeps it.
        norm: The greatest length of :math:`\Delta`, positive; infinite: any.

    Raises:
        InputError: If an argument is out of range.

    References:
        Sadat et al. 2024, https://arxiv.org/abs/2410.02416 (equations 5 to 8).
    """

    def __init__(self, guide: PairGuidance, eta: float = 0.0, norm: float = math.inf) -> None:
        super().__init__(guide)
        if not math.isfinite(eta):
            raise InputError(f"eta must be finite, got {eta}; 0 leaves the parallel part out.")
        if not norm > 0:
            raise InputError(f"norm must be positive, got {norm}; math.inf is without a limit.")
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
