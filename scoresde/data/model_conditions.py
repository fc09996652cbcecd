"""Compares the conditions of data with those that a model takes."""

from collections.abc import Sequence

from scoresde.data.base import SPLITS, Dataset
from scoresde.errors import InputError
from scoresde.model import Model
from scoresde.nn import Conditioning, Conditions


def check_conditions(model: Model, data: Dataset, splits: Sequence[str] = SPLITS) -> list[str]:
    """Compares the conditions of data with those that a model was built for.

    Arguments:
        model: The model.
        data: The data set.
        splits: The splits that are used.

    Returns:
        A sentence for each condition that the model takes and the data lack; an empty list if
        nothing is missing.

    Raises:
        InputError: If there are more classes than the network was built for.

    Example:
        >>> import torch
        >>> from scoresde import ScoreModel, VPSDE
        >>> from scoresde.nn import MLP
        >>> plain = Dataset.of("plain", [torch.randn(9, 2)] * 3)
        >>> check_conditions(ScoreModel(MLP(2, classes=3), VPSDE()), plain)[0][:45]
        'label must be given for the examples of plain'
    """
    if "label" in data.conditions:
        check_classes(model, max(int(part.max()) for part in data.conditions["label"]))
    given = [data.conditions_of(split, slice(1)) for split in splits]
    return [
        f"{name} must be given for the examples of {data.name}, got none: the network counts it "
        "as absent; add the condition to the data set, or build the network without it."
        for name in required_conditions(model)
        if not all(name in one for one in given)
    ]


def required_conditions(model: Model) -> tuple[str, ...]:
    """Returns the conditions that networks in a model were built for, but for augmentations."""
    parts = (part for part in model.modules() if isinstance(part, Conditions))
    names = dict.fromkeys(name for part in parts for name in part.names)
    return tuple(name for name in names if name != "augment")


def check_classes(model: Model, most: int) -> None:
    """Checks that networks in a model know all classes up to one.

    Raises:
        InputError: If one does not.
    """
    for part in model.modules():
        if not isinstance(part, Conditioning) or part.classes is None:
            continue
        classes = part.classes.num_embeddings - 1
        if most >= classes:
            raise InputError(
                f"label must be below classes={classes} of the network, got {most}; use one of "
                f"its classes, or train a network with classes={most + 1}."
            )


def class_count(model: Model, data: Dataset) -> int:
    """Returns how many classes a model has: those of its networks, or else those of its data."""
    parts = [part for part in model.modules() if isinstance(part, Conditioning)]
    known = [part.classes.num_embeddings - 1 for part in parts if part.classes is not None]
    if known:
        return max(known)
    return 1 + max(int(part.max()) for part in data.labels) if data.labels else 0
