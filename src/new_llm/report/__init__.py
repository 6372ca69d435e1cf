"""Reports of experiments: an HTML page, charts as files, and tables for the console."""

from new_llm.report.figures import write_chart, write_charts
from new_llm.report.page import write_page, write_report
from new_llm.report.results import load_results, make_run, read_runs, refuse_other_forms
from new_llm.report.tables import ColumnTable, SummaryTable

__all__ = [
    "ColumnTable",
    "SummaryTable",
    "load_results",
    "make_run",
    "read_runs",
    "refuse_other_forms",
    "write_chart",
    "write_charts",
    "write_page",
    "write_report",
]
