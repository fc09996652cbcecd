"""Densities from which training draws its times, and grids of sampling times."""

from scoresde.times.densities import (
    ChainTimes,
    FirstTime,
    FoldedTimes,
    ImportanceTimes,
    LevelTimes,
    LogNormalTimes,
    LowDiscrepancy,
    Times,
    UniformTimes,
)
from scoresde.times.grids import (
    CosineGrid,
    ExplicitGrid,
    Grid,
    KarrasGrid,
    LogSNRGrid,
    PowerGrid,
    UniformGrid,
)

__all__ = [
    "ChainTimes",
    "CosineGrid",
    "ExplicitGrid",
    "FirstTime",
    "FoldedTimes",
    "Grid",
    "ImportanceTimes",
    "KarrasGrid",
    "LevelTimes",
    "LogNormalTimes",
    "LogSNRGrid",
    "LowDiscrepancy",
    "PowerGrid",
    "Times",
    "UniformGrid",
    "UniformTimes",
]
