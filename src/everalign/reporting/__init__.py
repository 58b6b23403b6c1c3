"""What a run has learned and kept: terminal tables, plots and the HTML report.

The names below are loaded when first used, so that importing this package costs no matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everalign.learning.run_data import RunData, load_run
    from everalign.reporting.formats import comparison_table, score_table
    from everalign.reporting.report import write_report

__all__ = ["RunData", "comparison_table", "load_run", "score_table", "write_report"]

_HOMES = {
    "RunData": "everalign.learning.run_data",
    "comparison_table": "everalign.reporting.formats",
    "load_run": "everalign.learning.run_data",
    "score_table": "everalign.reporting.formats",
    "write_report": "everalign.reporting.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'everalign.reporting' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
