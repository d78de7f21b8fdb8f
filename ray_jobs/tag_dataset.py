"""`linearsr job tag-dataset` as a script: docs/reference/tag_dataset.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("tag-dataset")
