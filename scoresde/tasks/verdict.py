"""Warnings in the report of a run: overfitting and divergence."""

import math
from collections.abc import Mapping, Sequence

from scoresde.report import Score

_RISE = 0.05  # relative rise of the held-out loss that counts as clear


def overfitting(records: Sequence[Mapping[str, float | None]], kept: bool) -> str:
    """Returns a warning if the held-out loss has clearly risen from its minimum.

    The loss is measured with the same noise each time, so a rise is not due to chance.

    Arguments:
        records: The records of ``metrics.jsonl``; if records share a step, the last is used.
        kept: Whether the weights with the lowest loss are kept.
    """
    losses = {int(r["step"] or 0): r["validation_loss"] for r in records if "validation_loss" in r}
    finite = {step: v for step, v in losses.items() if v is not None and math.isfinite(v)}
    if not finite:
        return ""
    last, (least, best) = finite[max(finite)], min((v, step) for step, v in finite.items())
    if last - least <= _RISE * abs(least):
        return ""
    remedy = "evaluate the weights of that update with weights=best"
    if not kept:
        remedy = f"train for {best} updates (train.steps), or with train.keep_best=true"
    return (
        f"The held-out loss was least at update {best} ({least:.4g}) and is {last:.4g} at the "
        f"end, update {max(finite)}: the model overfits, and what is reported is of the last "
        f"weights; {remedy}."
    )


def divergence(own: Score, others: Sequence[Score]) -> str:
    """Returns a warning if a model is worse than a Gaussian.

    Arguments:
        own: The score of the model.
        others: The scores of the baselines.
    """
    gaussian = next((s for s in others if s.name == "Gaussian" and s.unit == own.unit), None)
    if gaussian is None or not math.isfinite(gaussian.value):
        return ""
    errors = [s.standard_error for s in (own, gaussian) if math.isfinite(s.standard_error)]
    if not own.value > gaussian.value + math.hypot(*errors):
        return ""
    return (
        f"The model scores {own.value:.3f} {own.unit}, worse than a Gaussian fitted to the same "
        f"training set ({gaussian.value:.3f}): it has diverged, overfits, or needs more updates; "
        "check optimizer.lr, train.steps and the loss on validation data."
    )
