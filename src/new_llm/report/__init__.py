"""The report of an experiment: a page to show, and a table for the console."""

from new_llm.report.html import render_report, write_report
from new_llm.report.results import load_results
from new_llm.report.tables import render_summary_table

__all__ = ["load_results", "render_report", "render_summary_table", "write_report"]
