"""The report: one self-contained HTML page about a run. Imports no torch."""

from flows.report.page import render_report

__all__ = ["render_report"]
