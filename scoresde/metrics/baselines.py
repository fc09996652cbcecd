r"""Classical densities that a deep model has to beat.

Both are fitted by scikit-learn to the same examples in the same units as the model, dequantised
if they are integers, and graded on the same test examples. A network that does not beat them has
learned less than a covariance matrix knows.
"""

import math
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


@dataclass(frozen=True)
class CovarianceFamily:
    r"""Gaussian mixtures of one kind of covariance.

    Arguments:
        covariance: ``full``, ``diag`` or ``tied`` (one full matrix for all components).
        regularisation: What is added to every variance, as a share of the mean variance of a
            feature, in [0, 1].
    """

    covariance: str
    regularisation: float

    def __post_init__(self) -> None:
        if self.covariance not in ("full", "diag", "tied"):
            raise InputError(
                f"covariance={self.covariance!r} is unknown; give full, diag or tied."
            )
        if not 0 <= self.regularisation <= 1:
            raise InputError(
                f"regularisation={self.regularisation} is outside [0, 1]; give 1e-3, say."
            )


FAMILIES = (
    CovarianceFamily("full", 1e-6),
    CovarianceFamily("full", 3e-3),
    CovarianceFamily("diag", 1e-3),
    CovarianceFamily("tied", 1e-3),
)


@dataclass(frozen=True, eq=False)
class Baseline:
    """The grades of a fitted density on test examples.

    Arguments:
        name: What was fitted.
        log_prob: Log-densities of the test examples in nats and model units, ``(N,)``, float64.
        shape: The shape of one example.
    """

    name: str
    log_prob: Tensor
    shape: tuple[int, ...]

    def bits_per_dim(
        self, scale: float | None = None, *, log_det: float | Tensor | None = None
    ) -> Estimate:
        """Returns the mean bits/dim; ``scale`` is model units per quantisation step.

        In its place ``log_det`` is what the codec adds to each log-density.
        """
        return Estimate.of(bits_per_dim(self.log_prob, self.shape, scale, log_det=log_det))

    def nats(
        self, scale: float | None = None, *, log_det: float | Tensor | None = None
    ) -> Estimate:
        """Returns the mean nats per example in raw units; ``scale`` is model per raw unit.

        In its place ``log_det`` is what the codec adds; with neither, the units are the model's.
        """
        scale = 1.0 if scale is None and log_det is None else scale
        return Estimate.of(nats(self.log_prob, self.shape, scale, log_det=log_det))


def gaussian_baseline(train: Tensor, test: Tensor, regularisation: float = 1e-6) -> Baseline:
    """Fits one Gaussian of full covariance by maximum likelihood.

    Arguments:
        train: Training examples in model units, dequantised, with shape ``(N, *)``.
        test: Test examples likewise.
        regularisation: As in :class:`CovarianceFamily`; above 0 it allows constant features.

    Raises:
        InputError: If the examples cannot be used or the covariance is singular.
    """
    a, c = _rows(train, test)
    fitted = _fit(a, CovarianceFamily("full", regularisation), components=1, seed=0)
    return Baseline("Gaussian", torch.from_numpy(fitted.score_samples(c)), tuple(test.shape[1:]))


def mixture_baseline(
    train: Tensor,
    validation: Tensor,
    test: Tensor,
    families: Iterable[CovarianceFamily] = FAMILIES,
    largest: int = 64,
    seed: int = 0,
) -> Baseline:
    """Fits Gaussian mixtures and keeps the one that is best on the validation examples.

    In each family the number of components doubles from 1 while that helps.

    Arguments:
        train: Training examples in model units, dequantised, with shape ``(N, *)``.
        validation: Validation examples likewise.
        test: Test examples likewise, seen by the chosen mixture only.
        families: The kinds of covariance to try.
        largest: The largest number of components, positive.
        seed: Names the starts of the fits.

    Raises:
        InputError: If the examples cannot be used or every covariance is singular.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn depends on it

    a, b, c = _rows(train, validation, test)
    if largest < 1:
        raise InputError(f"largest={largest} is no number of components; give 64, say.")
    with threadpool_limits(1):  # ten times faster: the matrices are small
        chosen = [_grow(a, b, family, min(largest, len(a)), seed) for family in families]
    if not chosen:
        raise InputError("families must hold at least one CovarianceFamily, got none.")
    _, name, best = max(chosen, key=lambda one: one[0])
    return Baseline(name, torch.from_numpy(best.score_samples(c)), tuple(test.shape[1:]))


def _grow(
    train: np.ndarray, validation: np.ndarray, family: CovarianceFamily, largest: int, seed: int
) -> tuple[float, str, Any]:
    """Doubles the components while validation improves: the grade, the name and the mixture."""
    best = (-math.inf, "", None)
    components = 1
    while components <= largest:
        fitted = _fit(train, family, components, seed)
        grade = fitted.score(validation)
        if grade <= best[0]:
            break
        best = (grade, f"mixture of {components} Gaussians ({family.covariance})", fitted)
        components *= 2
    return best


def _fit(rows: np.ndarray, family: CovarianceFamily, components: int, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        components,
        covariance_type=family.covariance,
        reg_covar=family.regularisation * rows.var(0).mean(),
        random_state=seed,
    )
    with warnings.catch_warnings():
        # The validation set judges every fit, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return mixture.fit(rows)
        except ValueError as error:
            raise InputError(
                f"{components} Gaussians ({family.covariance}) cannot be fitted to {len(rows)} "
                f"examples of {rows.shape[1]} features with "
                f"regularisation={family.regularisation}; give a larger one, such as 1e-3, or "
                "more examples."
            ) from error


def _rows(*examples: Tensor) -> tuple[np.ndarray, ...]:
    """Flattens examples to rows of float64."""
    shapes = [tuple(x.shape) for x in examples]
    if any(x.ndim < 1 or x.numel() == 0 for x in examples) or len({s[1:] for s in shapes}) > 1:
        raise InputError(f"Examples of shapes {shapes} cannot be compared; give (N, *) each.")
    if not all(x.isfinite().all() for x in examples):
        raise InputError("The examples have NaN or infinite values; remove them.")
    return tuple(x.double().reshape(len(x), -1).cpu().numpy() for x in examples)
