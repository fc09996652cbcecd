r"""Classical densities as baselines for deep models.

Both are fitted by scikit-learn to the same examples in the same units as the model, dequantised if
they are integers, and evaluated on the same test examples. A network with a lower likelihood has
learned less than a covariance matrix.

If there are few examples, the covariance of the Gaussian is shrunk towards a multiple of the
identity:

.. math:: (1 - s) \hat\Sigma + s \, \frac{\operatorname{tr} \hat\Sigma}{D} I .

The unshrunk covariance is singular if there are fewer examples than features, and far too small in
some directions if there are only slightly more. The weight :math:`s` maximises the likelihood of a
fifth of the training examples, given the others.

References:
    Friedman, *Regularized discriminant analysis*, Journal of the American Statistical Association
    84, 1989.
"""

import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError
from scoresde.metrics.bits import bits_per_dim, nats
from scoresde.metrics.estimate import Estimate

MOST_FEATURES = 4096  # for a fitted covariance: 128 MiB
_PLENTY = 10  # examples per feature above which the covariance is not shrunk
_SHARES = (10 ** np.linspace(-6, 0, 13)).tolist()  # candidate shrinkage weights
_ITERATIONS = 100  # of expectation-maximisation, at most
_BETWEEN = 10  # iterations between checks of the time


@dataclass(frozen=True)
class CovarianceFamily:
    r"""Family of Gaussian mixtures with one kind of covariance.

    Arguments:
        covariance: ``full``, ``diag`` or ``tied`` (one full matrix for all components).
        regularisation: Amount added to every variance, as a fraction of the mean variance of a
            feature, in [0, 1].
    """

    covariance: str
    regularisation: float

    def __post_init__(self) -> None:
        if self.covariance not in ("full", "diag", "tied"):
            raise InputError(f"covariance must be full, diag or tied, got {self.covariance!r}.")
        if not 0 <= self.regularisation <= 1:
            raise InputError(
                f"regularisation must be in [0, 1], got {self.regularisation}; a typical value is "
                "1e-3."
            )


FAMILIES = (
    CovarianceFamily("full", 1e-6),
    CovarianceFamily("full", 3e-3),
    CovarianceFamily("diag", 1e-3),
    CovarianceFamily("tied", 1e-3),
)


@dataclass(frozen=True, eq=False)
class Baseline:
    """Results of a fitted density on test examples.

    Arguments:
        name: Name of the density.
        log_prob: Log-densities of the test examples in nats and model units, ``(N,)``, float64.
        shape: Shape of one example.
        note: Remark on the fit, if any.
    """

    name: str
    log_prob: Tensor
    shape: tuple[int, ...]
    note: str = ""

    def bits_per_dim(
        self, scale: float | None = None, *, log_det: float | Tensor | None = None
    ) -> Estimate:
        """Returns the mean bits/dim; ``scale`` is model units per quantisation step.

        ``log_det``, an alternative to ``scale``, is the codec's term in each log-density.
        """
        return Estimate.of(bits_per_dim(self.log_prob, self.shape, scale, log_det=log_det))

    def nats(
        self, scale: float | None = None, *, log_det: float | Tensor | None = None
    ) -> Estimate:
        """Returns the mean nats per example in raw units; ``scale`` is model per raw unit.

        ``log_det``, an alternative to ``scale``, is the codec's term. With neither, the units are
        the model's.
        """
        scale = 1.0 if scale is None and log_det is None else scale
        return Estimate.of(nats(self.log_prob, self.shape, scale, log_det=log_det))


def gaussian_baseline(train: Tensor, test: Tensor, regularisation: float = 1e-6) -> Baseline:
    """Fits a Gaussian with full covariance, shrunk if there are few examples.

    Arguments:
        train: Training examples in model units, dequantised, with shape ``(N, *)``. With fewer
            than ten examples per feature the covariance is shrunk.
        test: Test examples likewise.
        regularisation: As in :class:`CovarianceFamily`; above 0 it allows constant features.

    Raises:
        InputError: If the examples are invalid or have too many features, or the covariance is
            singular.
    """
    family = CovarianceFamily("full", regularisation)
    a, c = _rows(train, test)
    shape = tuple(test.shape[1:])
    if len(a) >= _PLENTY * a.shape[1]:
        fitted = _fit(a, family, components=1, seed=0)
        return Baseline("Gaussian", torch.from_numpy(fitted.score_samples(c)), shape)
    log_prob, share = _shrunk(a, c, regularisation)
    note = f"covariance shrunk by {share:.2g}: {len(a)} examples of {a.shape[1]} features"
    return Baseline("Gaussian", torch.from_numpy(log_prob), shape, note)


def mixture_baseline(
    train: Tensor,
    validation: Tensor,
    test: Tensor,
    families: Iterable[CovarianceFamily] = FAMILIES,
    largest: int = 64,
    seed: int = 0,
    seconds: float = math.inf,
) -> Baseline:
    """Fits Gaussian mixtures and returns the best one on the validation examples.

    In each family the number of components doubles from 1 as long as the result improves.

    Arguments:
        train: Training examples in model units, dequantised, with shape ``(N, *)``.
        validation: Validation examples likewise.
        test: Test examples likewise, used only by the chosen mixture.
        families: Kinds of covariance to try.
        largest: Largest number of components, positive.
        seed: Seed of the starts of the fits.
        seconds: Time limit after which mixtures stop growing, with a remark in the baseline's
            note. One component of the first family is always fitted.

    Raises:
        InputError: If the examples are invalid or have too many features, or every covariance is
            singular.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn depends on it

    deadline = time.monotonic() + seconds
    a, b, c = _rows(train, validation, test)
    if largest < 1:
        raise InputError(f"largest must be at least 1, got {largest}.")
    # Full covariances of few examples are unreliable, so the diagonal families are fitted first.
    few = len(a) < 2 * a.shape[1]
    ordered = sorted(families, key=lambda one: few and one.covariance != "diag")
    growths = [_Growth(family, a, b, seed) for family in ordered]
    if not growths:
        raise InputError("families must contain at least one CovarianceFamily, got none.")
    with threadpool_limits(1):  # ten times faster: the matrices are small
        done = _grow(growths, min(largest, len(a)), deadline)
    best = max(growths, key=lambda one: one.score)
    log_prob = torch.from_numpy(best.mixture.score_samples(c))
    note = "" if done else f"growth stopped after {seconds:.0f} s"
    return Baseline(best.name, log_prob, tuple(test.shape[1:]), note)


class _Growth:
    """Best mixture of a family so far.

    Arguments:
        family: The kind of covariance.
        train: Training examples as rows.
        validation: Validation examples likewise.
        seed: Seed of the starts of the fits.
    """

    def __init__(
        self, family: CovarianceFamily, train: np.ndarray, validation: np.ndarray, seed: int
    ) -> None:
        self.family, self.train, self.validation, self.seed = family, train, validation, seed
        self.score, self.name, self.took = -math.inf, "", 0.0
        self.mixture: Any = None
        self.growing = True

    def grow(self, components: int, deadline: float) -> bool:
        """Fits a mixture and keeps it if it is better; returns whether there was time."""
        start = time.monotonic()
        if start + 2 * self.took > deadline:
            return False
        fitted = _fit(self.train, self.family, components, self.seed, deadline)
        if fitted is None:
            return False
        score, self.took = fitted.score(self.validation), time.monotonic() - start
        self.growing = score > self.score
        if self.growing:
            self.score, self.mixture = score, fitted
            self.name = f"mixture of {components} Gaussians ({self.family.covariance})"
        return True


def _grow(growths: list[_Growth], largest: int, deadline: float) -> bool:
    """Doubles the components of each family while this helps; returns whether there was time."""
    components = 1
    while components <= largest:
        for one in (one for one in growths if one.growing):
            limit = math.inf if growths[0].mixture is None else deadline
            if not one.grow(components, limit):
                return False
        components *= 2
    return True


def _fit(
    rows: np.ndarray,
    family: CovarianceFamily,
    components: int,
    seed: int,
    deadline: float = math.inf,
) -> Any:
    """Fits a mixture; returns None if the time runs out."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        components,
        covariance_type=family.covariance,
        reg_covar=family.regularisation * rows.var(0).mean(),
        random_state=seed,
        max_iter=_BETWEEN,
        warm_start=True,
    )
    with warnings.catch_warnings():
        # The validation set judges every fit, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            for _ in range(_ITERATIONS // _BETWEEN):
                if time.monotonic() > deadline:
                    return None
                if mixture.fit(rows).converged_:
                    break
        except ValueError as error:
            raise _unfit(f"{components} Gaussians ({family.covariance})", rows, family) from error
    return mixture


class _Spectrum:
    """Principal variances of examples, for Gaussians of any shrinkage.

    Arguments:
        rows: Examples, ``(N, D)``.
        regularisation: As in :class:`CovarianceFamily`.
    """

    def __init__(self, rows: np.ndarray, regularisation: float) -> None:
        self.mean, self.features = rows.mean(0), rows.shape[1]
        _, widths, self.axes = np.linalg.svd(rows - self.mean, full_matrices=False)
        self.variances = widths**2 / len(rows)
        self.level = self.variances.sum() / self.features
        self.floor = regularisation * self.level

    def log_prob(self, x: np.ndarray, share: float) -> np.ndarray:
        """Returns log-densities of examples under a covariance shrunk by a positive weight."""
        centred = x - self.mean
        along = (centred @ self.axes.T) ** 2
        inside = (1 - share) * self.variances + share * self.level + self.floor
        outside = share * self.level + self.floor
        # If the axes span everything, only rounding errors remain.
        spanned = len(self.axes) == self.features
        beyond = 0.0 if spanned else ((centred**2).sum(1) - along.sum(1)).clip(0) / outside
        volume = np.log(inside).sum() + (self.features - len(self.axes)) * math.log(outside)
        squares = (along / inside).sum(1) + beyond
        return -0.5 * (squares + volume + self.features * math.log(2 * math.pi))


def _shrunk(rows: np.ndarray, test: np.ndarray, regularisation: float) -> tuple[np.ndarray, float]:
    """Returns the log-densities of test examples under a shrunk covariance, and its weight."""
    held_out = np.arange(len(rows)) % 5 == 0
    if len(rows) < 3 or not np.ptp(rows[~held_out], axis=0).any():
        raise _too_few(rows)
    part, whole = (_Spectrum(r, regularisation) for r in (rows[~held_out], rows))
    share = max(_SHARES, key=lambda s: part.log_prob(rows[held_out], s).mean())
    return whole.log_prob(test, share), share


def _too_few(rows: np.ndarray) -> InputError:
    return InputError(
        "The training examples must be at least 3 that differ (without every fifth one), got "
        f"{len(rows)} ({len(np.unique(rows, axis=0))} different); use more examples."
    )


def _unfit(what: str, rows: np.ndarray, family: CovarianceFamily) -> InputError:
    if not np.ptp(rows, axis=0).any():
        return _too_few(rows)
    return InputError(
        f"Cannot fit {what} to {len(rows)} examples of {rows.shape[1]} features with "
        f"regularisation={family.regularisation}; use a larger one, such as 1e-3, or more "
        "examples."
    )


def _rows(*examples: Tensor) -> tuple[np.ndarray, ...]:
    """Flattens examples to rows of float64."""
    shapes = [tuple(x.shape) for x in examples]
    if any(x.ndim < 1 or x.numel() == 0 for x in examples) or len({s[1:] for s in shapes}) > 1:
        raise InputError(f"Examples must be non-empty and of one shape, (N, *), got {shapes}.")
    bad = sum(int((~x.isfinite()).sum()) for x in examples)
    if bad:
        raise InputError(
            f"All examples must be finite, got {bad} NaN or infinite values; remove them."
        )
    features = math.prod(shapes[0][1:])
    if features > MOST_FEATURES:
        raise InputError(
            f"Examples must have at most {MOST_FEATURES} features for a covariance, got "
            f"{features}."
        )
    return tuple(x.double().reshape(len(x), -1).cpu().numpy() for x in examples)
