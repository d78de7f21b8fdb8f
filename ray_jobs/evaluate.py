"""`linearsr job evaluate` as a script: docs/reference/evaluate.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("evaluate")
