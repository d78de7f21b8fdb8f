"""`python -m linearsr.cli`: the command, if `linearsr` is not on the PATH."""

import sys

from linearsr.cli import main

if __name__ == "__main__":
    sys.exit(main())
