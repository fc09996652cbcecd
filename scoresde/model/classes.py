"""The number of classes that a model was built for."""

from scoresde.model.base import Trainable
from scoresde.model.components import Mixture
from scoresde.nn.embedding import Conditioning


def classes_of(model: Trainable) -> int | None:
    """Returns the number of classes of the condition ``label``, or None if it is unknown.

    The number comes from the ``Conditioning`` of a network, or from the labels of an exact
    mixture. If several parts have one, it is the smallest.

    Arguments:
        model: A model.

    Example:
        >>> from scoresde import ScoreModel, VPSDE
        >>> from scoresde.nn import MLP
        >>> classes_of(ScoreModel(MLP(2, classes=3), VPSDE()))
        3
    """
    tables = [part.classes for part in model.modules() if isinstance(part, Conditioning)]
    known = [table.num_embeddings - 1 for table in tables if table is not None]
    exact = [part.classes for part in model.modules() if isinstance(part, Mixture)]
    return min((count for count in (*known, *exact) if count), default=None)
