"""All differences between the commands in the pages and the commands that the test runs."""

from __future__ import annotations

from tests.helpers.runs import SMALL
from tools import stand_in

# Pages that use the results of another page, which therefore runs first.
BEFORE = {
    "docs/guides/evaluation.md": "docs/guides/training.md",
    "docs/reference/finetune_experts.md": "docs/reference/pretrain.md",
    "docs/reference/tag_dataset.md": "docs/reference/build_shards.md",
    "docs/guides/storage.md": "docs/guides/fleet.md",
}

# Words of the pages that stand for a place of the user (regular expressions), and that place.
PLACES = {
    r"127\.0\.0\.1:8000\b": "127.0.0.1:{http}",
    r"127\.0\.0\.1:8265\b": "{dashboard}",
    r"127\.0\.0\.1:9000\b": "127.0.0.1:{s3}",
    r"^  port: 8000$": "  port: {http}",  # of ray_jobs/serve.yaml
    r"s3://BUCKET\b": "s3://bucket",
    r"(?<![\w/])(PHOTOS|VAL|RUNS|SHARDS|OTHER|SANA_FOLDER|SANA\.pth|RELEASE)\b": r"{data}/\1",
    r"\bexpert_gpus=0\.25\b": "expert_gpus=0",  # there is no GPU
    r"--expert-gpus 0\.5\b": "--expert-gpus 0",
    r"\breplicas=8\b": "replicas=4",  # there are two cores
}

_SHORT = [
    f"{stage}.{field}"
    for stage in ("pretrain", *(f"experts.{number}" for number in range(4)))
    for field in ("steps=2", "warmup=1", "report_every=1", "checkpoint_every=2")
]
_TRAINING = [part for setting in (*SMALL, *_SHORT) for part in ("--set", setting)]

# Flags after the page's own, so that a command ends in seconds. The last of two equal flags counts.
# Commands with --gpu get one CPU process instead.
_EXPERTS = [*_TRAINING, "--i-know-this-is-not-the-knee"]  # such a short run has no knee
# Sana-1.6B is as narrow as the stand-ins of its weights.
_NARROW = [part for setting in stand_in.SETTINGS for part in ("--set", setting)]
ADDED = {
    # The shapes of a small model are counted in seconds.
    "linearsr job plan": ["--recipe", "smoke", "--gpus", "2"],
    "linearsr job pretrain": _TRAINING,
    "linearsr job finetune-experts": _EXPERTS,
    "python -m tools.train_bundled": [
        *("--patch=32", "--batch=2", "--shrinks=0", "--stages"),
        *(f"{name}=1" for name in ("pretrain", "structure", "texture", "polish", "refinement")),
    ],
    "linearsr job plan --recipe sana_1_6b --gpus 2": [],
    "linearsr job build-shards --latents sana_1_6b": [
        *("--min-sharpness=0", "--crops-per-picture=1", "--crop=160", "--variants=1", "--gpus=0"),
        *_NARROW,
    ],
    "linearsr job pretrain --recipe sana_1_6b": ["--validation-gpus=0", *_NARROW],
    "linearsr job finetune-experts --recipe sana_1_6b": [
        *("--validation-gpus=0", "--i-know-this-is-not-the-knee"),
        *_NARROW,
    ],
    "python -m benchmarks.gpu": ["--minutes", "1", "--only", "machine"],
    "linearsr job build-shards": ["--min-sharpness=0", "--crops-per-picture=1"],
    "linearsr job tag-dataset": ["--actors", "1"],
    "python -m benchmarks": [
        *("--sides", "64", "--rounds", "1", "--compiled-up-to", "0", "--models", "linearsr-tiny"),
        *("--output", "runs/results"),
    ],
    "python -m benchmarks.serve": ["--count", "2", "--steps", "1", "--layouts", "together"],
    "python -m benchmarks.dataset": ["--pictures", "2"],
    "python -m benchmarks.latents": ["--divide", "32", "--patch", "64", "--rounds", "1"],
    "python -m benchmarks.tags": ["--steps", "1", "1", "1", "--threshold", "0"],
    "python -m pytest": ["--collect-only", "--ignore-glob=*"],  # pytest would run itself
    "python -m linearsr.weights.convert": ["--tag-heads", "2"],  # of stand-ins
    "curl": ["--fail-with-body", "--silent", "--show-error"],
}
GPU = {"pretrain": "--workers", "finetune_experts": "--workers"}  # other jobs have --actors

# Commands that must fail here, with their exit code and message. The flags are right if it appears.
REFUSES = {
    "python -m linearsr.distributed.health": (1, "must not join"),  # no GPU
    "python -m benchmarks --device cuda": (2, "cannot be used"),  # no GPU
    # LPIPS has no trunk here.
    "python -m tools.train_bundled": (1, "SqueezeNet 1.1, is not on this machine"),
    "linearsr tag photo.png --tagger ram": (2, "not a readable checkpoint"),  # the user has none
    "linearsr upscale photo.png -o big.png --model runs/weights": (2, "unknown model"),
    # On some pages no endpoint runs by then; test_redeploy.py has this command.
    "linearsr serve --redeploy": (2, "no endpoint runs here"),
    "python -m pytest": (5, "no tests"),
}

# Programs that cannot run here, and the checks of their stand-ins (tests/helpers/pages/fakes.py).
STAND_INS = {
    "pip": "would change the environment that the tests run in: uv resolves it",
    "make": "makes environments, and runs these tests: --dry-run",
    "docker": "no daemon: files, and tags that are those of the fleet",
    "kubectl": "no Kubernetes: names are those of the manifests",
    "helm": "no Kubernetes: flags alone",
    "hf": "no hub: the real program parses the command; stand-ins are copied",
    "aws": "no AWS: botocore knows the operation and its parameters; s3 sync copies",
    "ray up": "no AWS: Ray's own parser, and its check of the file",
    "ray down": "the same",
    "ray dashboard": "the same",
    "ray attach": "the same",
    "ray monitor": "the same",
    "ray exec": "the same; then runs the command here",
}
# Programs that run as they are.
REAL = ("linearsr", "python", "ray", "serve", "pre-commit", "curl")
TOOLS = ("base64", "openssl")
