"""`linearsr job deploy` as a script: docs/reference/deploy.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("deploy")
