"""The report of experiments: a page to show, and a table for the console."""

from new_llm.report.html import render_page, render_report, write_page, write_report
from new_llm.report.results import load_results
from new_llm.report.runs import read_runs
from new_llm.report.tables import render_summary_table

__all__ = [
    "load_results",
    "read_runs",
    "render_page",
    "render_report",
    "render_summary_table",
    "write_page",
    "write_report",
]
