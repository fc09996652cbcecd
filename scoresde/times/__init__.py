"""Where in time: the densities that training draws its times from, and the grids of samplers."""

from scoresde.times.densities import (
    ChainTimes,
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
