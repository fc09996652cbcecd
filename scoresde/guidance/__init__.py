"""Models made of models: each is a score function, and serves every sampler."""

from scoresde.guidance.clipping import ChangedData, Clipped, DynamicThreshold

__all__ = ["ChangedData", "Clipped", "DynamicThreshold"]
