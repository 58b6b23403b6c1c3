"""`python -m everalign` is the command `everalign`."""

import sys

from everalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
