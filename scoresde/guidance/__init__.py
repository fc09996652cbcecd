"""Guided models.

Each is a score function, is called like its parts, and works with every sampler.
``docs/guidance.md`` describes when to use each and what it samples.
"""

from scoresde.guidance.base import Guided, View
from scoresde.guidance.classifier import ClassifierGuidance
from scoresde.guidance.clipping import ChangedData, Clipped, DynamicThreshold
from scoresde.guidance.pairs import Autoguidance, ClassifierFreeGuidance, PairGuidance
from scoresde.guidance.tempered import ChangedGuidance, Projected, Rescaled

__all__ = [
    "Autoguidance",
    "ChangedData",
    "ChangedGuidance",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Clipped",
    "DynamicThreshold",
    "Guided",
    "PairGuidance",
    "Projected",
    "Rescaled",
    "View",
]
