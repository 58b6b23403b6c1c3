"""`python -m everalign` is the command `everalign`."""

from everalign.cli import main

if __name__ == "__main__":
    main()
