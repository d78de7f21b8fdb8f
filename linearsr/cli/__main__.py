"""`python -m linearsr.cli`, where the command is not on the path."""

import sys

from linearsr.cli import main

if __name__ == "__main__":
    sys.exit(main())
