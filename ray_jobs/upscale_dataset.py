"""`linearsr job upscale-dataset` as a script: docs/reference/upscale_dataset.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("upscale-dataset")
