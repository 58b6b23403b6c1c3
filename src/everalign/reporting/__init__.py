"""What a run has learned and kept: terminal tables, plots and the HTML report.

The names below are loaded when first used, so that importing this package costs no matplotlib.
"""

from typing import TYPE_CHECKING

from everalign.lazy import lazy_names

if TYPE_CHECKING:
    from everalign.learning.run_data import RunData, load_run
    from everalign.reporting.formats import comparison_table, score_table
    from everalign.reporting.report import write_report

__all__ = ["RunData", "comparison_table", "load_run", "score_table", "write_report"]

_HOMES = {
    "RunData": "everalign.learning.run_data",
    "comparison_table": ".formats",
    "load_run": "everalign.learning.run_data",
    "score_table": ".formats",
    "write_report": ".report",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
