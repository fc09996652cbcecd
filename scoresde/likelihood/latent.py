r"""The likelihood of data through their latents.

.. math:: \log p(y) \ge \mathbb{E}_{q(z \mid y)} \left[ \log p(z) + \log p(y \mid z)
          - \log q(z \mid y) \right] ,

where the last two terms are the codec's log-determinant (:mod:`scoresde.codec`), and the prior's
:math:`\log p(z)` may itself be a bound. The bound is exact if the codec is invertible, and
undefined if the codec has no density.

**Several draws.** Their average has the same expectation and a smaller error. The logarithm of the
average of their weights,

.. math:: \log \frac{1}{K} \sum_k p(z_k) \, p(y \mid z_k) / q(z_k \mid y) ,

is a tighter bound, but only if :math:`p(z_k)` is exact. The exponential of an estimate whose error
has the standard deviation s is too large by :math:`e^{s^2 / 2}`, so noise increases the
likelihood: with 16 draws and s = 1 nat, by 0.45 nats. Weighted draws are therefore not allowed
with a noisy prior term.

References:
    Vahdat et al., *Score-based generative modeling in latent space*, 2021,
    https://arxiv.org/abs/2106.05931 (equation 2).
    Burda et al., *Importance weighted autoencoders*, 2016, https://arxiv.org/abs/1509.00519
    (equation 8).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde.divergence import ExactTrace
from scoresde.errors import InputError, check_count
from scoresde.likelihood.base import LogProb
from scoresde.likelihood.bound import VariationalBound
from scoresde.likelihood.exact import Likelihood
from scoresde.likelihood.flow import as_trace
from scoresde.model import LatentModel, evaluating
from scoresde.streams import Streams, probe_seed


@dataclass(frozen=True)
class LatentBoundResult:
    """Result of an evaluation of the bound for B examples, float64, in nats of raw units.

    Arguments:
        log_prob: The lower bound of the log-density, ``(B,)``.
        prior: The mean over the draws of the log-density of the latents, ``(B,)``.
        log_det: The mean over the draws of the codec's log-determinant, ``(B,)``.
        standard_error: The standard error of ``log_prob`` over the draws, ``(B,)``. For a single
            draw it is only the error of the prior term; if the codec is deterministic, there is no
            other.
        nfe: The network passes of each example over all draws, int64 ``(B,)``.
        seed: The seed that was used.
        estimates: The bound from each draw, ``(B, K)``.
    """

    log_prob: Tensor
    prior: Tensor
    log_det: Tensor
    standard_error: Tensor
    nfe: Tensor
    seed: int
    estimates: Tensor


@dataclass(frozen=True)
class LatentBound:
    """Bounds the log-density of raw examples from below under a latent model.

    Arguments:
        likelihood: The likelihood or bound that evaluates the prior at the latents.
        draws: The number K of latents per example, positive.
        weighted: Whether the draws are importance-weighted. If False, they are averaged.

    Raises:
        InputError: If a value is out of range, or ``weighted`` is combined with a noisy prior
            term.

    Example:
        >>> from scoresde import GaussianModel, VPSDE
        >>> from scoresde.codec import Affine
        >>> prior = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> model = LatentModel(Affine((2,), width=2.0), prior)
        >>> LatentBound(Likelihood("exact"))(model, torch.zeros(1, 2), seed=0).log_prob
        tensor([-3.2242], dtype=torch.float64)
    """

    likelihood: LogProb = field(default_factory=VariationalBound)
    draws: int = 1
    weighted: bool = False

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        if self.weighted and self.draws > 1 and not self._exact:
            raise InputError(
                f"likelihood must be exact for importance weights, which would count its noise as "
                f"likelihood, got {self.likelihood}; use Likelihood(probes='exact') "
                "(likelihood=default likelihood.probes=exact), or weighted=False."
            )

    @property
    def _exact(self) -> bool:
        """True if the prior term has no noise of its own."""
        kind = self.likelihood
        return isinstance(kind, Likelihood) and isinstance(as_trace(kind.probes), ExactTrace)

    @torch.no_grad()
    def __call__(
        self,
        model: LatentModel,
        raw: Tensor,
        *,
        seed: int | None = None,
        seeds: Iterable[int] | None = None,
        **cond: Tensor,
    ) -> LatentBoundResult:
        """Evaluates a batch.

        Arguments:
            model: The latent model.
            raw: Raw examples of its codec, with shape ``(B, *)``.
            seed: Seed of the random streams of the latents, and of the prior's evaluation.
            seeds: The index of each example's stream; ``range(B)`` by default.
            **cond: Conditions for the prior, each with shape ``(B, *)``.

        Raises:
            InputError: If the codec has no density, or the likelihood cannot evaluate the prior.
        """
        self.likelihood.check(model.prior)
        streams = Streams.of(seed, seeds, len(raw), raw.device)
        priors, log_dets, variances, nfes = [], [], [], []
        with evaluating(model):
            for k in range(self.draws):
                x = model.codec.encode(raw, streams, k)
                log_det = model.codec.log_det(raw, x)
                if log_det is None:
                    raise InputError(
                        "codec must have a density for the likelihood of raw data, got "
                        f"{type(model.codec).__name__}, whose density is None; use a VAE."
                    )
                found = self.likelihood(
                    model.prior,
                    x.to(model.device),
                    seed=probe_seed(streams.seed, k),
                    seeds=streams.indices,
                    **cond,
                )
                priors.append(found.log_prob.double())
                log_dets.append(log_det.double().to(found.log_prob.device))
                variances.append(found.standard_error.double().square())
                nfes.append(found.nfe)
        prior, log_det = torch.stack(priors, 1), torch.stack(log_dets, 1)
        log_prob, error = self._combined(prior + log_det)
        if self.draws == 1:
            error = variances[0].sqrt()
        return LatentBoundResult(
            log_prob=log_prob,
            prior=prior.mean(1),
            log_det=log_det.mean(1),
            standard_error=error,
            nfe=torch.stack(nfes).sum(0),
            seed=streams.seed,
            estimates=prior + log_det,
        )

    def _combined(self, estimates: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bound by the draws ``(B, K)``, and its standard error, each ``(B,)``."""
        count = estimates.shape[1]
        if not self.weighted:
            return estimates.mean(1), estimates.std(1, unbiased=count > 1) / count**0.5
        log_prob = estimates.logsumexp(1) - math.log(count)
        weights = (
            estimates - log_prob[:, None]
        ).exp()  # with mean 1, for the error of a logarithm
        return log_prob, weights.std(1, unbiased=count > 1) / count**0.5
