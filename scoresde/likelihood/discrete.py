r"""The variational bound of a chain of T steps, term by term.

A chain of states :math:`x_1, \dots, x_T` at times :math:`t_1 < \dots < t_T = 1` is drawn by the
forward process :math:`q`. The model runs in reverse: it draws :math:`x_T` from the prior, each
state from a Gaussian :math:`p(x_{i-1} \mid x_i)`, and the data from a decoder
(:mod:`scoresde.codec.decoder`). With Jensen's inequality,

.. math:: -\log p(x) \le \underbrace{-E_q \log p(x \mid x_1)}_{\text{reconstruction}}
          + \underbrace{\sum_{i \ge 2} E_q \, KL(q(x_{i-1} \mid x_i, x) \,\|\,
          p(x_{i-1} \mid x_i))}_{\text{consistency}}
          + \underbrace{KL(q(x_T \mid x) \,\|\, p(x_T))}_{\text{prior}} .

**Consistency.** Both distributions are Gaussian. With the variance :math:`\tilde v` of
:math:`q(x_s \mid x_t, x)`, the model's variance :math:`v` (:mod:`scoresde.likelihood.variance`),
and means that differ by :math:`\alpha_s \tau^2 / \sigma_t^2` times the error of the denoised data,

.. math:: KL = \tfrac12 \sum \left[ \frac{\tilde v}{v} - 1 - \log \frac{\tilde v}{v}
          + \frac{\alpha_s^2 \tau^4}{\sigma_t^4} \frac{(x - D)^2}{v} \right] .

With :math:`v = \tilde v` the weight of :math:`\tfrac12 (x - D)^2` is the difference of the
signal-to-noise ratios, :math:`SNR_s - SNR_t`. It is infinite if s has no noise: the step to the
data itself belongs to the decoder.

**Subsets of the steps.** A random subset of K terms, each divided by K times the probability
:math:`p_i` of its step, is an unbiased estimate of the sum. The probabilities are the shares of
the steps in the bound of unit Gaussian data,

.. math:: p_i \propto \frac{SNR_s - SNR_t}{1 + SNR_t} ,

since the terms of early steps, and their noise, are larger by many orders of magnitude. One step
is drawn from each of K equal parts of the distribution, as in stratified sampling. On the digits
with T = 1000, 64 draws are more accurate than all steps once, because early steps are drawn
several times.

**The standard error** is estimated from one draw of the noise. Each term is divided by its value
for unit Gaussian data; neighbouring terms then differ by little except the noise, and half their
mean squared difference is the variance of a term. If the error of the denoised data changes much
from one step to the next, as in a chain of few steps, the estimate is too large rather than too
small.

**Many steps.** The bound of an exact model tends to the log-density as the steps become fine in
the log-SNR, with a gap of order 1/T for either variance; with :math:`v = \tilde v` it tends to
:class:`~scoresde.likelihood.VariationalBound`. Equal steps of t do not become fine near t = 0 if
no noise is left there: the ratio :math:`SNR_1 / SNR_2` stays at about 2 for any number of steps.
Then, on real data, :math:`\tilde v`, which assumes that the data are known, costs about 0.4
nats/dim for any T, and :math:`\tau^2` almost nothing (N(0, 0.25), VP, T = 1000: 0.443 and 0.001).
On levels that can be told apart in the first state, it is the reverse.

References:
    Ho et al., *Denoising diffusion probabilistic models*, 2020, https://arxiv.org/abs/2006.11239
    (equations 5 to 8).
    Kingma et al., *Variational diffusion models*, 2021, https://arxiv.org/abs/2107.00630
    (equations 11 and 13).
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
from scoresde.likelihood.variance import (
    PosteriorVariance,
    Variance,
    forward_variance,
    per_example,
    posterior_variance,
    steps_of,
)
from scoresde.model import Conditioned, ScoreFunction, check_model, evaluating
from scoresde.passes import counting
from scoresde.sde import SDE, as_time
from scoresde.shapes import sum_features
from scoresde.streams import Purpose, Streams

_LEAST_NOISE = 1e-6  # in model units, of a first state at t = 0
_FIRST_DRAWS = 4  # of the first state, to estimate the error of the reconstruction


@dataclass(frozen=True)
class DiscreteBoundResult(LogProbResult):
    """Result of an evaluation of the bound for B examples, in nats.

    Arguments:
        log_prob: The lower bound of the log-probability (for real data, a log-density in model
            units), ``(B,)``: minus the sum of the three parts.
        reconstruction: The expected negative log-probability of the decoder, ``(B,)``.
        consistency: The sum of the steps' divergences, ``(B,)``.
        prior: The divergence of the noised example from the prior, exact, ``(B,)``.
        terms: The divergence of each of T steps, ``(B, T)``. If the chain begins at clean data,
            the first is 0, since that step belongs to the decoder. For a random subset they are
            unbiased estimates: 0 for a step that was not drawn, and weighted for one that was.
        times: The time at which each step ends (the larger), float64 ``(T,)``.
        standard_error: The standard error of ``log_prob`` over the noise and the drawn steps,
            ``(B,)``, from the differences of neighbours (see above); NaN for a single term.
        nfe: The network passes that each example took part in, int64 ``(B,)``.
        seed: The seed that was used.
        size: The number D of values of an example.
    """

    log_prob: Tensor
    reconstruction: Tensor
    consistency: Tensor
    prior: Tensor
    terms: Tensor
    times: Tensor
    standard_error: Tensor
    nfe: Tensor
    seed: int
    size: int

    @property
    def parts(self) -> dict[str, Tensor]:
        return {
            "reconstruction": self.reconstruction,
            "consistency": self.consistency,
            "prior": self.prior,
        }

    @property
    def steps(self) -> Tensor:
        return self.terms

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound in bits per dimension (of levels; model units for real data), ``(B,)``."""
        return -self.log_prob / (self.size * math.log(2))


@dataclass(frozen=True)
class DiscreteBound(LogProb):
    r"""Bounds :math:`\log p(x)` from below by the chain of T steps, term by term.

    Arguments:
        decoder: The last step, to the data: :class:`~scoresde.codec.Levels` or
            :class:`~scoresde.codec.DiscretisedGaussian` for data on levels. If None, it is a
            Gaussian around the denoised data, for real data.
        steps: The number T of steps into which a continuous SDE is divided, uniformly in t. They
            start at t = 0 if noise is left there; otherwise the first step ends at 1/T. If None,
            the steps of a discrete chain are used.
        variance: The variance of the model's steps; :class:`ForwardVariance` suits real data
            better (see above).
        draws: The number K of steps drawn at random for each example, positive. At equal cost this
            is more accurate than all steps (see above). If None, all steps are used.

    Raises:
        InputError: If an argument is out of range.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=0.5, sde=VPSDE())
        >>> b = DiscreteBound(None, steps=10)(exact, torch.zeros(3, 2), seed=0)
        >>> parts = b.reconstruction + b.consistency + b.prior
        >>> b.terms.shape, torch.allclose(b.log_prob, -parts)
        (torch.Size([3, 10]), True)
    """

    decoder: Decoder | None = None
    steps: int | None = None
    variance: Variance = field(default_factory=PosteriorVariance)
    draws: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "draws"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.steps == 1:
            raise InputError("steps must be at least 2, got 1; use 1000.")
        if not isinstance(self.decoder, Decoder | None):
            raise InputError(
                f"decoder must be a Decoder, such as Levels(256), or None for real data, got "
                f"{self.decoder}."
            )
        if not isinstance(self.variance, Variance):
            raise InputError(
                f"variance must be a Variance, such as PosteriorVariance(), got {self.variance}."
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
    ) -> DiscreteBoundResult:
        """Evaluates a batch.

        Arguments:
            model: A score function.
            x: Data in model units, with shape ``(B, *)``; levels lie at their centres.
            seed: Seed of the random streams of noise and steps. If None, a new one is drawn.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the network, each with shape ``(B, *)``.

        Raises:
            InputError: If the arguments do not match the model, or the data are not finite or not
                at the centres of the decoder's levels.
        """
        times = self.check(model).to(model.device)
        last_step = self.decoder or GaussianDecoder()
        last_step.check(x)
        streams = Streams.of(seed, seeds, len(x), model.device)
        state, bound = model.state(x), Conditioned(model, cond)
        with evaluating(model), counting(len(x), model.device) as passes:
            first = torch.stack(
                [
                    self._reconstruction(bound, last_step, state, times[0], streams, draw)
                    for draw in range(_FIRST_DRAWS)
                ],
                1,
            )
            evaluate = self._all if self.draws is None else self._some
            terms, variance = evaluate(bound, state, times, streams)
        reconstruction, consistency = first.mean(1), terms.sum(1)
        prior = prior_kl(model.sde, state)
        clean = terms.new_zeros(len(terms), 0 if self._noised(model.sde) else 1)
        return DiscreteBoundResult(
            log_prob=-(reconstruction + consistency + prior),
            reconstruction=reconstruction,
            consistency=consistency,
            prior=prior,
            terms=torch.cat((clean, terms), 1),
            times=times[1:] if self._noised(model.sde) else times,
            standard_error=(variance + first.var(1) / _FIRST_DRAWS).sqrt(),
            nfe=passes.network,
            seed=streams.seed,
            size=x.shape[1:].numel(),
        )

    def check(self, model: ScoreFunction) -> Tensor:
        """Returns the times of the chain's states for a model, float64, ascending.

        Raises:
            InputError: If its bound cannot be evaluated.
        """
        check_model(model)
        sde, steps = model.sde, self.steps or steps_of(model.sde)
        return torch.arange(0 if self._noised(sde) else 1, steps + 1).double() / steps

    @torch.no_grad()  # a schedule may have weights
    def _noised(self, sde: SDE) -> bool:
        """True if noise is left at t = 0, so the chain has a state there."""
        # cos(pi/2), say, is not quite 0.
        return float(sde.sigma(as_time(0.0))) > _LEAST_NOISE

    def _reconstruction(
        self,
        bound: Conditioned,
        decoder: Decoder,
        x: Tensor,
        t: Tensor,
        streams: Streams,
        draw: int,
    ) -> Tensor:
        z = streams.normal(x.shape[1:], Purpose.NOISE, draw, x.dtype)
        return reconstruction_term(
            bound.model, x, bound.sde.perturb(x, t, z), t, decoder, self.variance, **bound.cond
        )

    def _graded(
        self, bound: Conditioned, x: Tensor, z: Tensor, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the term of a step, and its value for unit Gaussian data, ``(B,)``."""
        state, sde = bound.sde.perturb(x, t, z), bound.sde
        data, v = self.variance.step(bound.model, state, t, s, **bound.cond)
        noise = sde.sigma(t) ** 2
        usual = per_example(noise / (noise + sde.alpha(t) ** 2), x).to(x)
        found, expected = (
            _divergence(bound.model, squares, v, t, s)
            for squares in ((x - data).square(), usual.expand_as(x))
        )
        return found, expected

    def _all(
        self, bound: Conditioned, x: Tensor, times: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """Returns every term, and the variance of their sum due to the noise."""
        found = []
        for i in range(len(times) - 1):
            z = streams.normal(x.shape[1:], Purpose.NOISE, _FIRST_DRAWS + i, x.dtype)
            found.append(self._graded(bound, x, z, times[i + 1], times[i]))
        terms, expected = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return terms, _variance_of_sum(terms, expected)

    def _some(
        self, bound: Conditioned, x: Tensor, times: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor]:
        """Returns weighted terms of randomly drawn steps, and the variance of their sum."""
        draws, shares = int(self.draws or 1), _shares(bound.sde, times)
        u = streams.uniform((draws,), Purpose.TIME, 0, torch.float64)
        places = (torch.arange(draws, device=u.device) + u) / draws
        rows = torch.searchsorted(shares.cumsum(0), places.contiguous()).clamp(max=len(shares) - 1)
        terms, each = x.new_zeros(len(x), len(shares)), []
        for k, row in enumerate(rows.unbind(1)):
            z = streams.normal(x.shape[1:], Purpose.NOISE, _FIRST_DRAWS + k, x.dtype)
            found, _ = self._graded(bound, x, z, times[row + 1], times[row])
            each.append(found / (draws * shares[row]).to(x))
            terms.scatter_add_(1, row[:, None], each[-1][:, None])
        values = torch.stack(each, 1)
        # Not divided by the expected values: a part of the distribution contains unequal steps.
        return terms, _variance_of_sum(values, torch.ones_like(values))


def _shares(sde: SDE, times: Tensor) -> Tensor:
    """Returns the shares of the steps in the bound of unit Gaussian data, float64 ``(T,)``."""
    signal, noise = sde.alpha(times).double() ** 2, sde.sigma(times).double() ** 2
    snr = signal / noise
    parts = (snr[:-1] - snr[1:]) / (1 + snr[1:])
    return parts / parts.sum()


def _variance_of_sum(values: Tensor, expected: Tensor) -> Tensor:
    """Returns the variance of the sum of independent values ``(B, n)``, NaN for n = 1.

    Arguments:
        values: The values; neighbouring ratios to the expected values have similar means.
        expected: Their approximate means, up to a common factor, positive, ``(B, n)``.
    """
    if values.shape[1] == 1:
        return torch.full_like(values[:, 0], torch.nan)
    apart = 0.5 * (values / expected).diff(dim=1).square()
    both = torch.cat((apart[:, :1], apart, apart[:, -1:]), 1)
    each = 0.5 * (both[:, :-1] + both[:, 1:])  # the mean of the neighbours on both sides
    return (expected.square() * each).sum(1)


def consistency_term(
    model: ScoreFunction,
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    variance: Variance,
    **cond: Tensor,
) -> Tensor:
    r"""Returns :math:`KL(q(x_s \mid x_t, x_0) \,\|\, p(x_s \mid x_t))` for s < t.

    Arguments:
        model: The model.
        x0: Clean data, with shape ``(B, *)``.
        x: States at time ``t``, with that shape.
        t: The later times, with shape ``()`` or ``(B,)``.
        s: The earlier times, with the same shapes, where some noise is left.
        variance: The variance of the model's step.
        **cond: Conditions, each with shape ``(B, *)``.

    Returns:
        Nats, with shape ``(B,)``, differentiable in the model's weights.
    """
    data, v = variance.step(model, x, t, s, **cond)
    return step_divergence(model, x0, data, v, t, s)


def step_divergence(
    model: ScoreFunction, x0: Tensor, data: Tensor, v: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    r"""Returns :func:`consistency_term` if the model's step is known.

    Arguments:
        model: The model.
        x0: Clean data, with shape ``(B, *)``.
        data: The denoised data at time ``t``, with that shape.
        v: The variance of the model's step, which broadcasts to ``x0``.
        t: The later times, with shape ``()`` or ``(B,)``.
        s: The earlier times, with the same shapes, where some noise is left.
    """
    return _divergence(model, (x0 - data).square(), v, t, s)


def _divergence(model: ScoreFunction, squares: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Returns the divergence for squared errors of the denoised data."""
    sde, s, t = model.sde, as_time(s), as_time(t)
    gain = sde.alpha(s) * forward_variance(model, t, s) / sde.sigma(t) ** 2
    excess = per_example(posterior_variance(model, t, s), squares) / v - 1
    spread = (excess - torch.log1p(excess)).to(squares)
    weight = (per_example(gain, squares).square() / v).to(squares)
    return 0.5 * sum_features(spread + weight * squares)


def reconstruction_term(
    model: ScoreFunction,
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    decoder: Decoder,
    variance: Variance,
    **cond: Tensor,
) -> Tensor:
    r"""Returns :math:`-\log p(x_0 \mid x_t)` of the decoder at the first time.

    Arguments:
        model: The model.
        x0: Clean data, with shape ``(B, *)``.
        x: States at time ``t``, with that shape.
        t: The first time, with shape ``()`` or ``(B,)``.
        decoder: The decoder.
        variance: The variance of the model's steps.
        **cond: Conditions, each with shape ``(B, *)``.

    Returns:
        Nats, with shape ``(B,)``, differentiable in the model's weights.
    """
    t = as_time(t)
    v = variance.first(model, x, t, **cond)
    first = First.of(model.sde, x, t, lambda: model.denoise(x, t, **cond), v)
    return -decoder.log_prob(x0, first).to(x)
