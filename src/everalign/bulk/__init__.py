"""Work on whole datasets: bounded memory, resumable, in parts or on Ray.

Names are loaded when first used, so that importing the package costs nothing.
"""

from everalign.lazy import lazy_names

_HOMES = {"BulkOptions": ".job", "join_files": ".files", "run_bulk": ".run", "Finished": ".job"}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
