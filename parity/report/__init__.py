"""The outcome of a check as a value, and its table, JSON, page and exit code."""

from parity.report.level import Divergence, Level
from parity.report.report import ParityError, Report

__all__ = ["Divergence", "Level", "ParityError", "Report"]
