"""Comparison of the conditions of data with those of a model."""

from collections.abc import Sequence

from scoresde.data.base import SPLITS, Dataset
from scoresde.errors import InputError
from scoresde.model import Trainable, classes_of
from scoresde.nn import Conditions


def check_conditions(
    model: Trainable, data: Dataset, splits: Sequence[str] = SPLITS, optional: Sequence[str] = ()
) -> list[str]:
    """Compares the conditions of data with those of a model.

    Arguments:
        model: The model.
        data: The data set.
        splits: Splits in use.
        optional: Conditions that the data may lack.

    Returns:
        A sentence for each condition of the model that the data lack; an empty list if none is
        missing.

    Raises:
        InputError: If there are more classes than the network was built for.

    Example:
        >>> import torch
        >>> from scoresde import ScoreModel, VPSDE
        >>> from scoresde.nn import MLP
        >>> plain = Dataset.of("plain", [torch.randn(9, 2)] * 3)
        >>> check_conditions(ScoreModel(MLP(2, classes=3), VPSDE()), plain)[0][:45]
        'label must be a condition of plain, got none '
    """
    if "label" in data.conditions:
        check_classes(model, max(int(part.max()) for part in data.conditions["label"]))
    given = [data.conditions_of(split, slice(1)) for split in splits]
    return [
        f"{name} must be a condition of {data.name}, got none (the network treats it as absent); "
        "add the condition to the data set, or build the network without it."
        for name in required_conditions(model)
        if name not in optional and not all(name in one for one in given)
    ]


def required_conditions(model: Trainable) -> tuple[str, ...]:
    """Returns the conditions of the networks in a model, except augmentations."""
    parts = (part for part in model.modules() if isinstance(part, Conditions))
    names = dict.fromkeys(name for part in parts for name in part.names)
    return tuple(name for name in names if name != "augment")


def check_classes(model: Trainable, most: int) -> None:
    """Checks that a model has all classes up to ``most``.

    Raises:
        InputError: If a class is missing.
    """
    classes = classes_of(model)
    if classes is not None and most >= classes:
        raise InputError(
            f"label must be less than classes={classes} of the network, got {most}; use one of "
            f"its classes, or train a network with classes={most + 1}."
        )


def class_count(model: Trainable, data: Dataset) -> int:
    """Returns the number of classes of a model's networks, or else of its data."""
    known = classes_of(model)
    if known is not None:
        return known
    return 1 + max(int(part.max()) for part in data.labels) if data.labels else 0
