"""Imports run one way; heavy packages load where they are used and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import linearsr

PACKAGE = Path(linearsr.__file__).parent

# Each layer may import itself and those before it.
LAYERS = [
    ["errors", "threads", "digests", "cuda_graph"],
    ["config", "diffusion.experts"],
    ["storage"],
    ["hub", "kernels"],
    ["imaging", "diffusion"],
    ["latent", "denoiser", "tags"],
    ["weights"],
    ["metrics"],
    ["pipeline"],
    ["evaluation"],
    ["training"],
    ["web"],
    ["distributed"],
    ["distributed.train", "distributed.datasets", "distributed.serve"],
    ["cli"],
]
# These packages must not import each other.
APART = ["distributed.train", "distributed.datasets", "distributed.serve"]
# The modules that may import a heavy package, at the top or in a function.
HEAVY = {
    "ray": ["distributed", "cli"],
    "deepspeed": ["training.engine"],
    "triton": ["kernels"],
    "boto3": ["storage"],
    "pyarrow": ["storage", "imaging.sources", "distributed", "evaluation.report"],
    "matplotlib": ["training.plot"],
    "diffusers": ["latent", "weights.convert"],
    "peft": ["training.lora"],
    "pyiqa": ["metrics"],
    "lpips": ["metrics"],
    "torchmetrics": ["metrics"],
    "spandrel": ["evaluation.checkpoint"],
    "pyvips": ["imaging"],
    "imagehash": ["distributed.datasets"],
    "fastapi": ["web"],
    "starlette": ["web"],
    "uvicorn": ["web", "distributed.compat"],
    "tenacity": ["distributed.serve"],
}


def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }


def _within(module: str, parts: list[str]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def _layer(module: str) -> int:
    """Return the layer of the longest prefix, so that a module may differ from its package."""
    fits = [
        (len(part), i)
        for i, layer in enumerate(LAYERS)
        for part in layer
        if _within(module, [part])
    ]
    assert fits, f"{module} has no layer: add it to LAYERS"
    return max(fits)[1]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_run_one_way(module: str) -> None:
    known = _modules()
    for name in _imports(_modules()[module]):
        ours = name.removeprefix("linearsr.")
        if name.startswith("linearsr.") and (ours in known or f"{ours}.__init__" in known):
            assert _layer(ours) <= _layer(module), f"{module} must not import {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports within functions count too. The package itself only hands on names when asked."""
    modules = {f"linearsr.{name}".removesuffix(".__init__"): p for name, p in _modules().items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= targets & modules.keys()
                if not targets <= modules.keys():
                    graph[name] |= {node.module} & modules.keys()
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", sorted(_modules()))
def test_heavy_packages_stay_in_their_place(module: str) -> None:
    for name in _imports(_modules()[module]):
        package = name.split(".")[0]
        assert package not in HEAVY or _within(module, HEAVY[package]), f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("linearsr", ["torch", "ray", "numpy"]),
        ("linearsr.config", ["torch", "ray"]),
        ("linearsr.diffusion.experts", ["torch", "ray"]),
        ("linearsr.cli", ["torch", "ray", "numpy", "tqdm", "PIL"]),
        ("linearsr.training.knee", ["torch", "ray", "scipy", "kneed"]),
        ("linearsr.training.loop", ["ray", "deepspeed", "pyiqa"]),
        ("linearsr.cli.jobs.plan", ["torch", "ray"]),
        ("linearsr.training.plan", ["ray", "deepspeed", "diffusers"]),
        # A machine with a GPU may have little besides torch.
        ("tools.train_bundled.__main__", ["ray", "pyvips", "psutil", "pyiqa", "diffusers"]),
        # `linearsr evaluate` on Parquet needs no Ray.
        ("linearsr.evaluation.sources", ["ray"]),
        ("linearsr.pipeline.upscaler", ["ray", "triton", "diffusers", "pyiqa", "deepspeed"]),
        # The base install is small.
        (
            "linearsr.pipeline.codec",
            ["torchvision", "transformers", "timm", "pyarrow", "boto3", "scipy", "matplotlib"],
        ),
        # A replica only runs a model.
        ("linearsr.distributed.serve.expert", ["linearsr.training", "deepspeed"]),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_needed(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,  # where `tools` is
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("module", sorted(m for m in _modules() if _within(m, APART)))
def test_applications_do_not_import_each_other(module: str) -> None:
    (own,) = [package for package in APART if _within(module, [package])]
    others = [package for package in APART if package != own]
    for name in _imports(_modules()[module]):
        assert not _within(name.removeprefix("linearsr."), others), f"{module} imports {name}"
