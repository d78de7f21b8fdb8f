"""`linearsr job pretrain` as a script: docs/reference/pretrain.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("pretrain")
