"""A progress bar in notebooks, where nobody sees standard error move."""

import html
import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]


def default_progress() -> Progress:
    """Returns what shows progress where the caller gives nothing: a bar in a notebook, nothing elsewhere."""
    shell = sys.modules.get("IPython")
    # The kernel of a notebook, such as Jupyter's or Colab's.
    if "ipykernel" in sys.modules and shell is not None and shell.get_ipython() is not None:
        return _Bar()
    return lambda stage, done, total: None


class _Bar:
    """One line of HTML that is replaced: a stage, its bar, and steps done of steps in all."""

    _handle: Any = None  # that of IPython's display, once there is something to replace

    def __call__(self, stage: str, done: int, total: int) -> None:
        from IPython.display import HTML, display

        text = f"{html.escape(stage)} <progress value={done} max={total}></progress> {done}/{total}"
        if self._handle is None:
            self._handle = display(HTML(text), display_id=True)
        else:
            self._handle.update(HTML(text))
