"""`linearsr job finetune-experts` as a script: docs/reference/finetune_experts.md."""

from linearsr.cli.job import main

if __name__ == "__main__":
    main("finetune-experts")
