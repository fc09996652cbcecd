r"""Metrics of a classifier: accuracy, confusion, calibration, and a linear baseline.

**Calibration.** A classifier is calibrated if a fraction p of the examples with predicted
probability p of a class has this class. Examples are sorted by their confidence, the probability
of the predicted class, into bins of equal width on [0, 1], and

.. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{accuracy}_b
          - \mathrm{confidence}_b \right| .

On a finite set of examples the error is positive even for a calibrated classifier. The floor is
the expected error if the outcomes are drawn with the confidences as probabilities. The number
:math:`S_b` of correct predictions in a bin is then a sum of independent Bernoulli variables with a
known distribution, and the floor is :math:`\sum_b E |S_b - E S_b| / n`.

References:
    Naeini, Cooper and Hauskrecht, *Obtaining well calibrated probabilities using Bayesian
    binning*, 2015.
    Guo et al., *On calibration of modern neural networks*, 2017, https://arxiv.org/abs/1706.04599
    (equation 3).
    Wilson, *Probable inference, the law of succession, and statistical inference*, 1927.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.metrics.baselines import MOST_FEATURES
from scoresde.metrics.estimate import Estimate
from scoresde.streams import random_rows

_MOST = 10_000  # examples for the fit of a linear classifier


def accuracy(label: Tensor, truth: Tensor) -> Estimate:
    r"""Returns the fraction of correct labels.

    Its standard error is half of Wilson's interval of one standard deviation: close to
    :math:`\sqrt{p (1 - p) / n}`, and positive even if all labels are correct.

    Arguments:
        label: Predicted classes, int64 ``(N,)``.
        truth: True classes, int64 ``(N,)``.

    Raises:
        InputError: If there are no examples, or the lengths differ.

    Example:
        >>> print(accuracy(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 2])))
        0.750 ± 0.200
    """
    _check_pair(label, truth)
    n = len(truth)
    p = float((label == truth).double().mean())
    return Estimate(p, math.sqrt(p * (1 - p) / n + 1 / (4 * n**2)) / (1 + 1 / n), n)


def confusion(label: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts examples by their true class (row) and the predicted one (column), ``(C, C)``.

    Arguments:
        label: Predicted classes, int64 ``(N,)``; those below 0 are not counted.
        truth: True classes, int64 ``(N,)``, below ``classes``.
        classes: Number C of classes.

    Raises:
        InputError: If there are no examples, the lengths differ, or a class is out of range.

    Example:
        >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    _check_pair(label, truth)
    check_count("classes", classes)
    kept = label >= 0
    for name, values in (("label", label[kept]), ("truth", truth[kept])):
        whole = not values.is_floating_point()
        if not whole or bool(((values < 0) | (values >= classes)).any()):
            raise InputError(
                f"{name} must be integers from 0 to {classes - 1}, got "
                f"{values.unique().tolist()}; use another number of classes."
            )
    places = truth[kept] * classes + label[kept]
    return torch.bincount(places, minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Accuracy versus confidence, in B bins of equal width on [0, 1].

    Arguments:
        count: Number of examples in each bin, int64 ``(B,)``.
        confidence: Mean confidence in each bin, ``(B,)``; NaN in an empty bin.
        accuracy: Fraction of correct predictions, ``(B,)``; NaN in an empty bin.
        error: Standard deviation of the accuracy if the confidences were correct, ``(B,)``.
        floor: Expected calibration error of a calibrated classifier on the same number of
            examples.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    error: Tensor
    floor: float

    @property
    def expected_error(self) -> float:
        """The expected calibration error, in [0, 1]."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((self.count * gaps).sum() / self.count.sum())


def reliability(confidence: Tensor, right: Tensor, bins: int = 10) -> Reliability:
    """Compares confidences with outcomes.

    Arguments:
        confidence: Probability of each predicted class, in [0, 1], ``(N,)``.
        right: Whether each prediction is correct, bool ``(N,)``.
        bins: Number B of bins, positive.

    Raises:
        InputError: If there are no examples, lengths differ, or a confidence is outside [0, 1].

    Example:
        >>> result = reliability(torch.tensor([0.5, 0.5]), torch.tensor([True, True]))
        >>> result.expected_error, result.floor
        (0.5, 0.25)
    """
    _check_pair(confidence, right)
    check_count("bins", bins)
    p = confidence.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError(
            f"confidence must be in [0, 1], got {float(p.min())} to {float(p.max())}."
        )
    place = (p * bins).long().clamp(max=bins - 1)
    parts = [(p[place == b], right[place == b].double()) for b in range(bins)]
    count = torch.bincount(place, minlength=bins)
    spread = torch.stack([(q * (1 - q)).sum().sqrt() for q, _ in parts])
    return Reliability(
        count=count,
        confidence=torch.stack([q.mean() for q, _ in parts]),
        accuracy=torch.stack([y.mean() for _, y in parts]),
        error=spread / count,
        floor=sum(_mean_deviation(q.cpu().numpy()) for q, _ in parts) / len(p),
    )


def _mean_deviation(p: np.ndarray) -> float:
    """Returns E|S - E S| of a sum of independent Bernoulli variables."""
    law = _law_of_sum(p)
    return float(law @ np.abs(np.arange(len(law)) - p.sum()))


def _law_of_sum(p: np.ndarray) -> np.ndarray:
    """Returns the probabilities of 0 to n successes in n independent trials."""
    laws = [np.ones(1), *(np.array([1 - q, q]) for q in p)]
    while len(laws) > 1:  # in pairs of equal lengths
        pairs = zip(laws[::2], laws[1::2], strict=False)
        rest = laws[-1:] if len(laws) % 2 else []
        laws = [np.convolve(a, b) for a, b in pairs] + rest
    return laws[0]


def logistic_regression(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Fits scikit-learn's logistic regression and returns its predictions for other examples.

    Each feature is standardised by the training examples. If there are more than 10 000 examples,
    a random subset of 10 000 is used.

    Arguments:
        train: Training examples, with shape ``(N, *)``, finite, of at most 4096 features.
        labels: Their classes, int64 ``(N,)``, at least two different ones.
        test: Other examples, with shape ``(M, *)``.
        classes: Number C of classes.

    Returns:
        Log-probabilities in nats, ``(M, C)``, float64; -inf for a class without examples.

    Raises:
        InputError: If there are too many features, or fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check_pair(train, labels)
    features, found = train[0].numel(), labels.unique()
    if features > MOST_FEATURES or len(found) < 2:
        raise InputError(
            f"Logistic regression requires at most {MOST_FEATURES} features and at least two "
            f"classes, got {features} features and the classes {found.tolist()}."
        )
    rows = random_rows(len(train), _MOST).to(train.device)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the fit is evaluated on the test set
        linear.fit(_rows(train[rows]), labels[rows.to(labels.device)].cpu().numpy())
    result = torch.full((len(test), classes), -torch.inf, dtype=torch.float64)
    result[:, linear.classes_] = torch.from_numpy(linear.predict_log_proba(_rows(test)))
    return result


def _rows(x: Tensor) -> np.ndarray:
    return x.double().reshape(len(x), -1).cpu().numpy()


def _check_pair(values: Tensor, truth: Tensor) -> None:
    if values.ndim < 1 or truth.ndim != 1 or len(values) != len(truth) or len(truth) == 0:
        raise InputError(
            "There must be at least one example and one class per example, (N,), got shapes "
            f"{tuple(values.shape)} and {tuple(truth.shape)}."
        )
