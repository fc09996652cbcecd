"""The report of a run: its figures and its page."""

from scoresde.report.page import Figure, Report, SamplerResult, Score, Table, write_report

__all__ = [
    "Figure",
    "Report",
    "SamplerResult",
    "Score",
    "Table",
    "write_report",
]
