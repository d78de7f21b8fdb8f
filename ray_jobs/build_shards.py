"""`linearsr job build-shards` as a script: docs/reference/build_shards.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("build-shards")
