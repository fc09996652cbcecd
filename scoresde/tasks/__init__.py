"""The tasks of the command line, as plain functions of objects."""

from scoresde.tasks.evaluation import Evaluation, evaluate_likelihood
from scoresde.tasks.report import report_training
from scoresde.tasks.sampling import Drawing, Drawn, draw_samples, save_samples, stream_samples

__all__ = [
    "Drawing",
    "Drawn",
    "Evaluation",
    "draw_samples",
    "evaluate_likelihood",
    "report_training",
    "save_samples",
    "stream_samples",
]
