r"""The variational bound: a lower bound of the log-likelihood, computed from the training loss.

A model draws :math:`x_1` from the prior, runs the reverse SDE down to :math:`\epsilon` and ends
with :math:`x \sim N(D(x_\epsilon), s^2 I)`, where :math:`D` is the denoised data and
:math:`s = \sigma / \alpha` at :math:`\epsilon`. The forward process :math:`q` gives a bound of its
density, as in any model with latent variables:

.. math:: \log p(x) \ge E_q \left[ \log \frac{p(x_1) \, p(x_{[\epsilon, 1)} \mid x_1) \,
          p(x \mid x_\epsilon)}{q(x_1 \mid x) \, q(x_{[\epsilon, 1)} \mid x_1, x)} \right]
          = - \mathrm{KL} + R - L .

**Prior.** :math:`\mathrm{KL} = KL(q(x_1 \mid x) \,\|\, N(0, \pi^2 I))` has a closed form,
:func:`prior_kl`.

**Diffusion.** Given :math:`x`, the reverse of :math:`q` is an SDE with the drift
:math:`f x_t + g^2 z / \sigma`, where :math:`x_t = \alpha x + \sigma z`. The model's drift is
:math:`f x_t + g^2 \hat z / \sigma`, and both have the diffusion :math:`g`. By Girsanov's theorem,
the divergence of two such processes is half the integral of the squared difference of the drifts
over :math:`g^2`,

.. math:: L = \tfrac12 \int_\epsilon^1 \frac{g^2}{\sigma^2} \, E \lVert z - \hat z(x_t, t)
          \rVert^2 \, dt = \tfrac12 \int_{\lambda(1)}^{\lambda(\epsilon)} E \lVert z - \hat z
          \rVert^2 \, d\lambda ,

because :math:`g^2 / \sigma^2 = -\lambda'` (:mod:`scoresde.times`). If times are drawn uniformly in
the log-SNR :math:`\lambda`, the weight is constant, the length of the range. This is importance
sampling, and the bound then depends on the SDE only through its two ends.

**Reconstruction.** The part before the cut-off is one Gaussian step. The error of the denoised
data is :math:`s` times the error of the noise, so

.. math:: R = -\tfrac{D}{2} \log(2 \pi s^2) - \tfrac12 E \lVert z - \hat z(x_\epsilon, \epsilon)
          \rVert^2 .

With a decoder over levels (:mod:`scoresde.codec.decoder`), R is its expected log-probability
instead. The bound is then on the probability of the levels, without dequantisation.

The second term of the Gaussian step counts like one more unit of log-SNR at the cut-off. An exact
model loses :math:`\tfrac14 \sum r^2`, with :math:`r = s^2 / c` for eigenvalues :math:`c` of the
covariance of the data (see :mod:`scoresde.likelihood.cutoff`). At any cut-off, the bound remains a
bound of a density of the data.

**Which likelihood.** The bound is for the model that samples with the *SDE*. The probability-flow
ODE has a different density unless the score is that of a diffusion, and the bound does not apply
to it: for a trained network either value may be larger. For an exact model the reverse process is
that of :math:`q`, and the bound is tight for *every* example, except for the prior's mismatch and
the reconstruction. A model that differs from the exact one by :math:`\delta(x_t, t)` loses, on
average over the data, :math:`\tfrac12 \int E \lVert \delta \rVert^2 d\lambda + \tfrac12 E \lVert
\delta(x_\epsilon, \epsilon) \rVert^2`.

**Variance.** The squared error of the noise falls from about :math:`D` at the cut-off to about 0
at :math:`t = 1`, so estimates from independent times are noisy. Evenly spaced times with a random
shift, as in training, wrap around from one end to the other, and this jump causes an error of up
to half its size over K. :class:`Folded` times have no jump.

References:
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (the bound in continuous time).
    Song et al., *Maximum likelihood training of score-based diffusion models*, 2021,
    https://arxiv.org/abs/2101.09258 (the bound for single examples).
    Huang et al., *A variational perspective on diffusion-based generative models and score
    matching*, 2021, https://arxiv.org/abs/2106.02808.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.codec import Decoder, First, GaussianDecoder
from scoresde.errors import InputError, check_count
from scoresde.likelihood.base import LogProb, LogProbResult
from scoresde.likelihood.prior import prior_kl
from scoresde.model import Conditioned, ScoreFunction, check_model, evaluating
from scoresde.passes import counting
from scoresde.sde import SDE, as_time
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams
from scoresde.times import FoldedTimes, ImportanceTimes, Times


@dataclass(frozen=True)
class BoundResult(LogProbResult):
    """Result of an evaluation of the bound for B examples, in nats.

    Arguments:
        log_prob: The lower bound of the log-density in model units, or of the log-probability of
            a decoder's levels, ``(B,)``: the reconstruction minus the two divergences.
        prior_kl: The divergence of the noised example from the prior, exact, ``(B,)``.
        reconstruction: The expected log-density of the last step, ``(B,)``.
        diffusion: The weighted error of the noise, ``(B,)``.
        standard_error: The standard error of ``log_prob`` over the replicates, ``(B,)``; NaN for a
            single replicate.
        nfe: The network passes that each example took part in, int64 ``(B,)``.
        seed: The seed that was used.
        estimates: The bound from each replicate, ``(B, R)``; ``log_prob`` is their mean.
    """

    log_prob: Tensor
    prior_kl: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    standard_error: Tensor
    nfe: Tensor
    seed: int
    estimates: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        return {
            "reconstruction": -self.reconstruction,
            "diffusion": self.diffusion,
            "prior": self.prior_kl,
        }


@dataclass(frozen=True)
class VariationalBound(LogProb):
    r"""Bounds :math:`\log p(x)` from below under a score function.

    The times of an example are evenly spread and come from its own stream, so its value is the
    same alone and in any batch. Such times are not independent, and their scatter would
    overestimate the error (it is the error of independent times). Therefore the whole set of draws
    is repeated, and the standard error is computed from the independent replicates. It is correct
    in the mean square from two replicates on. For a mean over many examples, use the scatter of
    the examples instead.

    Arguments:
        draws: The number K of times in a replicate, positive.
        times: The distribution of the times. Its density must agree with its weight.
        eps: The cut-off, in [0, 1). If None, the default of the model's SDE is used
            (``sde.cutoffs.likelihood``: 1e-5 for VP, 1e-3 for sub-VP, 0 for VE).
        replicates: The number of independent replicates, positive; each costs K + 1 passes.
        decoder: The last step to data on levels, such as :class:`~scoresde.codec.Levels`. If None,
            it is the Gaussian step to real data of the reconstruction above.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> result = VariationalBound(draws=8)(exact, torch.zeros(3, 2), seed=0)
        >>> result.log_prob.shape, result.nfe.tolist()
        (torch.Size([3]), [18, 18, 18])
    """

    draws: int = 8
    times: Times = field(default_factory=lambda: FoldedTimes(ImportanceTimes()))
    eps: float | None = None
    replicates: int = 2
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        check_count("replicates", self.replicates)
        if not isinstance(self.times, Times):
            raise InputError(f"times must be a Times such as ImportanceTimes(), got {self.times}.")
        if not isinstance(self.decoder, Decoder | None):
            raise InputError(
                f"decoder must be a Decoder, such as Levels(256), or None for real data, got "
                f"{self.decoder}."
            )

    @torch.no_grad()
    def __call__(
        self,
        model: ScoreFunction,
        x: Tensor,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **cond: Tensor,
    ) -> BoundResult:
        """Evaluates a batch.

        Arguments:
            model: A score function.
            x: Data in model units, with shape ``(B, *)``.
            seed: Seed of the random streams of times and noise. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not match the model, or the data are not finite.
        """
        eps = self.check(model)
        (self.decoder or GaussianDecoder()).check(x)
        streams = Streams.of(seed, seeds, len(x), model.device)
        state, field = model.state(x), Conditioned(model, cond)
        with evaluating(model), counting(len(x), model.device) as passes:
            sets = [self._replicate(field, state, eps, streams, r) for r in range(self._sets)]
        reconstruction, diffusion = (torch.stack(part, 1) for part in zip(*sets, strict=True))
        prior = prior_kl(model.sde, state)
        return BoundResult(
            log_prob=reconstruction.mean(1) - diffusion.mean(1) - prior,
            prior_kl=prior,
            reconstruction=reconstruction.mean(1),
            diffusion=diffusion.mean(1),
            standard_error=_standard_error(reconstruction - diffusion),
            nfe=passes.network,
            seed=streams.seed,
            estimates=reconstruction - diffusion - prior[:, None],
        )

    def error_of(self, estimates: Tensor) -> Tensor:
        """Returns the standard error of the mean of estimates, ``(B, R)`` to ``(B,)``.

        Arguments:
            estimates: The ``estimates`` of a result, or their differences between two results with
                the same seed.
        """
        return _standard_error(estimates)

    def check(self, model: ScoreFunction) -> float:
        """Returns the cut-off for a model.

        Raises:
            InputError: If its bound cannot be evaluated.
        """
        check_model(model)
        sde = model.sde
        eps = sde.check_eps(sde.cutoffs.likelihood if self.eps is None else self.eps)
        _check_density(self.times, sde, eps)
        return eps

    @property
    def _sets(self) -> int:
        return int(self.replicates)

    def _replicate(
        self, model: Conditioned, x: Tensor, eps: float, streams: Streams, replicate: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the reconstruction and the diffusion term from K + 1 passes, each ``(B,)``."""
        draws, sde = int(self.draws), model.sde
        first = replicate * (draws + 1)
        reconstruction = self._reconstruction(model, x, as_time(eps), streams, first)
        u = streams.uniform((draws,), Purpose.TIME, replicate, torch.float64)
        # Each row on its own: examples of a batch share no shift.
        u = torch.func.vmap(self.times.spread)(u)
        t = self.times.quantile(u, sde, eps)
        rate = (1 - eps) * self.times.weight(t, sde, eps) * (sde.g(t) / sde.sigma(t)) ** 2
        diffusion = torch.zeros_like(reconstruction)
        for k in range(draws):
            error = _squared_error(model, x, t[:, k], streams, first + 1 + k)
            diffusion += 0.5 / draws * rate[:, k].to(x) * error
        return reconstruction, diffusion

    def _reconstruction(
        self, model: Conditioned, x: Tensor, t: Tensor, streams: Streams, draw: int
    ) -> Tensor:
        """Returns the expected log-probability of the last step, from one draw, ``(B,)``."""
        sde, t = model.sde, t.to(x.device)
        if self.decoder is None:
            scale = float(sde.log_snr(t)) - math.log(2 * math.pi)
            error = _squared_error(model, x, t, streams, draw)
            return 0.5 * x.shape[1:].numel() * scale - 0.5 * error
        state = sde.perturb(x, t, streams.normal(x.shape[1:], Purpose.NOISE, draw, x.dtype))
        return self.decoder.log_prob(
            x, First.of(sde, state, t, lambda: model.denoise(state, t))
        ).to(x)


def _squared_error(
    model: Conditioned, x: Tensor, t: Tensor, streams: Streams, draw: int
) -> Tensor:
    """Returns the squared error of one draw of the noise at ``t``, ``()`` or ``(B,)``."""
    z = streams.normal(x.shape[1:], Purpose.NOISE, draw, x.dtype).to(x.device)
    return sum_features((z - model.noise(model.sde.perturb(x, t, z), t)).square())


def _standard_error(values: Tensor) -> Tensor:
    """Returns the standard error of the mean of ``(B, R)`` values, NaN for R = 1."""
    count = values.shape[1]
    if count == 1:
        return torch.full_like(values[:, 0], torch.nan)
    return values.std(1) / count**0.5


@torch.no_grad()
def _check_density(times: Times, sde: SDE, eps: float) -> None:
    r"""Checks at a few points that :math:`dt / du = 1 / p(t)` agrees with the weight.

    Raises:
        InputError: If not; the average would then estimate another integral.
    """
    # A learned schedule computes in float32, which cannot resolve times that are closer. The step
    # is not a multiple of 1/1000, so the levels of a chain do not pass for a density.
    u, h = torch.linspace(0.07, 0.93, 7, dtype=torch.float64), 1.3e-3
    slope = (times.quantile(u + h, sde, eps) - times.quantile(u - h, sde, eps)) / (2 * h)
    weight = (1 - eps) * times.weight(times.quantile(u, sde, eps), sde, eps)
    if not torch.allclose(slope, weight, rtol=1e-2, atol=0):
        raise InputError(
            "times must have a weight that corrects for its density, since the average is not a "
            f"bound otherwise, got {times}; use ImportanceTimes() or UniformTimes(), or spread "
            "one of them with FoldedTimes()."
        )
