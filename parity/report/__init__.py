"""The outcome of a check as a value: a table, JSON, a page, and the exit code."""

from parity.report.level import Divergence, Level
from parity.report.report import ParityError, Report

__all__ = ["Divergence", "Level", "ParityError", "Report"]
