"""Models made of models: each is a score function, and serves every sampler.

A guided model is asked as its parts are. Which of them to use when, and what they sample, is in
``docs/guidance.md``.
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
