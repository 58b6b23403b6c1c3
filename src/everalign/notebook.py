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
        # One line of HTML that is replaced: a stage, its bar, and steps done of steps in all.
        handle: Any = None  # that of IPython's display, once there is something to replace

        def show(stage: str, done: int, total: int) -> None:
            nonlocal handle
            from IPython.display import HTML, display

            text = f"{html.escape(stage)} <progress value={done} max={total}></progress> {done}/{total}"
            if handle is None:
                handle = display(HTML(text), display_id=True)
            else:
                handle.update(HTML(text))

        return show
    return lambda stage, done, total: None
