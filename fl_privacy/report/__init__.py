"""Results to one self-contained HTML page."""

from fl_privacy.report.page import render, write_report
from fl_privacy.report.reading import ReportError

__all__ = ["ReportError", "render", "write_report"]
