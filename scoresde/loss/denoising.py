r"""Denoising score matching across noise levels.

For data :math:`x_0`, a time :math:`t` and noise :math:`z`, the expected noise of a model at
:math:`x_t = \alpha x_0 + \sigma z` is graded against the noise that was there,

.. math:: L = w(t) \, \frac{1}{D} \lVert \hat z(x_t, t) - z \rVert^2 .

Its least value over all functions is reached by :math:`\hat z = E[z \mid x_t]`, that is by the
exact score, for any positive weight.

======================  =======================================  ================================
weighting               w(t)                                     equals
======================  =======================================  ================================
noise                   1                                        "simple" loss of DDPM
likelihood              :math:`g^2 / \sigma^2`                   the bound on the log-likelihood
EDM                     :math:`1 + \sigma^2/(\alpha\sigma_d)^2`  unit variance of the target
======================  =======================================  ================================

References:
    Vincent, *A connection between score matching and denoising autoencoders*, 2011.
    Song et al. 2021, https://arxiv.org/abs/2011.13456 (equation 7).
    Song et al. 2021, https://arxiv.org/abs/2101.09258 (likelihood weighting, equation 7).
    Karras et al. 2022, https://arxiv.org/abs/2206.00364 (table 1).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.loss.weighting import NoiseWeighting, Weighting
from scoresde.model import ScoreFunction, check_model
from scoresde.sde import as_time
from scoresde.shapes import check_batch
from scoresde.streams import Purpose, Streams
from scoresde.times import Times, UniformTimes


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Grades a score model on data: one value per example.

    Arguments:
        weighting: How much each noise level counts.
        times: How training times are drawn; whatever the choice (but for
            :class:`~scoresde.times.LogNormalTimes`) the loss has the same expectation.
        eps: The smallest time, in [0, 1); ``None`` takes the default of the model's SDE
            (``sde.cutoffs.training``: 1e-5 for VP and VE, 1e-3 for sub-VP).
        reduce_mean: Whether an example's error is the mean over its D dimensions, or half their
            sum (:math:`D/2` times as much), which meets a clipped gradient and an optimiser's
            epsilon differently; NCSN++ was trained with half the sum.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> loss = DenoisingScoreMatching()
        >>> loss(exact, exact.sample(8, seed=0), seed=0).shape
        torch.Size([8])
    """

    weighting: Weighting = field(default_factory=NoiseWeighting)
    times: Times = field(default_factory=UniformTimes)
    eps: float | None = None
    reduce_mean: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.weighting, Weighting) and isinstance(self.times, Times)):
            raise InputError(
                f"weighting={self.weighting}, times={self.times}: give a Weighting and a Times, "
                "such as NoiseWeighting() and UniformTimes()."
            )

    def __call__(
        self,
        model: ScoreFunction,
        x: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        part: slice | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Returns the weighted squared error of each example, with shape ``(B,)``.

        Arguments:
            model: A score function.
            x: Clean data in model units, with shape ``(B, *)``.
            t: Times, with shape ``()`` or ``(B,)``. Given, they are taken as they are; drawn, they
                are weighted for the density that they come from.
            noise: Standard normal noise, with shape ``(B, *)``.
            seed: Names the random streams of what is not given; ``None`` draws a fresh one.
            seeds: The index of each example's stream; ``range(B)`` by default.
            part: Which of the ``seeds`` are those of ``x``, if it is a part of a larger batch
                whose times are drawn together (``LowDiscrepancy``).
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If ``eps`` cannot be used with the SDE, or shapes do not fit.
        """
        check_model(model)
        check_batch(x)
        sde = model.sde
        eps = sde.check_eps(sde.cutoffs.training if self.eps is None else self.eps)
        streams = None
        if t is None or noise is None:
            streams = Streams.of(seed, seeds, len(x) if part is None else None, x.device)
        here = slice(None) if part is None else part
        weight: Tensor | float = 1.0
        if t is not None and not bool(((as_time(t) >= 0) & (as_time(t) <= 1)).all()):
            raise InputError("A time is outside [0, 1]; t is a fraction and no step number.")
        if t is None:
            assert streams is not None
            u = self.times.spread(streams.uniform((), Purpose.TIME, dtype=torch.float64))[here]
            t = self.times.quantile(u, sde, eps)
            weight = self.times.weight(t, sde, eps)
        if noise is None:
            assert streams is not None
            noise = streams[here].normal(x.shape[1:], Purpose.NOISE, dtype=x.dtype)
        if noise.shape != x.shape:
            raise InputError(
                f"The noise has shape {tuple(noise.shape)} and the data {tuple(x.shape)}; they "
                "must agree."
            )
        t = as_time(t)
        error = model.noise(sde.perturb(x, t, noise), t, **cond) - noise
        squares = error.square().flatten(1)
        grade = squares.mean(1) if self.reduce_mean else 0.5 * squares.sum(1)
        return (weight * self.weighting(sde, t)).to(x) * grade
