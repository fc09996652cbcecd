"""Densities from which training draws its times, and grids of sampling times."""

from scoresde.times.closed import ClosedTimes
from scoresde.times.curves import (
    Corrected,
    CosMapTimes,
    CurvedTimes,
    LogitNormalTimes,
    ModeTimes,
    UShapedTimes,
)
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
    "ClosedTimes",
    "Corrected",
    "CosMapTimes",
    "CosineGrid",
    "CurvedTimes",
    "ExplicitGrid",
    "FirstTime",
    "FoldedTimes",
    "Grid",
    "ImportanceTimes",
    "KarrasGrid",
    "LevelTimes",
    "LogNormalTimes",
    "LogSNRGrid",
    "LogitNormalTimes",
    "LowDiscrepancy",
    "ModeTimes",
    "PowerGrid",
    "Times",
    "UShapedTimes",
    "UniformGrid",
    "UniformTimes",
]
