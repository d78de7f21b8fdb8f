"""The contents of the distributions, and the wheel alone in a clean environment.

These tests need the package registry, as `make` does.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from linearsr.errors import LinearSRError, MissingExtra, require

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
JOBS = {"evaluation", "tags", "data", "serve"}
EXTRAS = {*JOBS, "sana", "quality", "train", "all", "demo", "bench", "dev"}
# Tracked files at the top level that are not for users; all others are.
NOT_FOR_USERS = {".ci", ".pre-commit-config.yaml"}

# A build of PyTorch for CPUs that the package works with, as pip names it.
CPU_BUILD = "2.13.0+cpu"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _environment(**more: str) -> dict[str, str]:
    """Return this process's environment without Python's own variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | more


def _uv(*arguments: object) -> None:
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    _uv("build", "--python", sys.executable, "--out-dir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def about(wheel: Path) -> Metadata:
    """The metadata of the wheel, parsed by the rules of the index."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, without extras, in current versions."""
    folder = tmp_path_factory.mktemp("clean")
    versions = {d.name: d.version.partition("+")[0] for d in metadata.distributions()}
    versions.pop("linearsr", None)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={v}\n" for name, v in versions.items()))
    _uv("venv", "--python", sys.executable, folder / "venv")
    programs = folder / "venv" / "bin"
    # torch with CUDA takes gigabytes; with links they are neither copied nor held in memory.
    how = ("--link-mode", "symlink", "--constraint", constraints)
    _uv("pip", "install", "--python", programs / "python", *how, wheel)
    return programs


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Run:
    """A function that runs a program of the clean environment, away from the sources."""

    def call(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [clean / program, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=_environment()
        )

    return call


def _tracked() -> set[str]:
    """Return the tracked names at the top level."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {line.partition("/")[0] for line in listed.stdout.splitlines()}


def test_the_source_distribution_holds_every_file_for_users(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert not [name for name in names if name.endswith(".pyc") or ".venv" in name]
    assert "tests/test_packaging.py" in names and "examples/upscale.py" in names
    assert _tracked() - {name.partition("/")[0] for name in names} <= NOT_FOR_USERS


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "linearsr"
    ours = {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert "linearsr/py.typed" in ours and "linearsr/web/page/index.html" in ours
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == ours
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_wheel_metadata_has_licence_python_version_extras_and_readme(about: Metadata) -> None:
    assert about.license_expression == "Apache-2.0"
    assert about.requires_python is not None and "3.10.0" in about.requires_python
    assert set(about.provides_extra or []) == EXTRAS
    assert about.description == (ROOT / "README.md").read_text()
    assert about.description_content_type == "text/markdown"


def _brought(about: Metadata, extra: str) -> set[str]:
    """Return the packages that an extra brings, also through other extras."""
    packages: set[str] = set()
    for requirement in about.requires_dist or []:
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        packages.add(canonicalize_name(requirement.name))
        if requirement.name == "linearsr":
            packages |= {name for other in requirement.extras for name in _brought(about, other)}
    return packages


def test_extras_keep_the_base_small(about: Metadata) -> None:
    base = {r.name for r in about.requires_dist or [] if r.marker is None}
    assert base == {
        *("numpy", "pillow", "psutil", "pydantic", "pyvips"),
        *("safetensors", "torch", "tqdm", "typing-extensions"),
    }
    everything = _brought(about, "all")
    for extra in (*JOBS, "sana", "quality", "train"):
        assert _brought(about, extra) <= everything
    assert not everything & {"pytest", "scikit-image"}


def test_only_quality_and_training_bring_packages_that_are_not_for_commercial_use(
    about: Metadata,
) -> None:
    for extra in JOBS:
        assert "pyiqa" not in _brought(about, extra)
    assert "pyiqa" in _brought(about, "quality") & _brought(about, "train")


def _asked() -> Iterator[tuple[str, list[str]]]:
    """Yield the arguments of every `require("extra", "package", ...)` of the package."""
    for path in (ROOT / "linearsr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                extra, *packages = (ast.literal_eval(word) for word in node.args)
                yield extra, packages


def test_advice_names_an_extra_that_brings_the_package(about: Metadata) -> None:
    homes = metadata.packages_distributions()
    requirements = list(_asked())
    assert {*JOBS, "sana", "quality", "train"} <= {extra for extra, _ in requirements}
    for extra, packages in requirements:
        brought = _brought(about, extra)
        for package in packages:
            names = {canonicalize_name(Requirement(name).name) for name in homes[package]}
            assert names & brought, f"linearsr[{extra}] does not bring {package}"


def test_require_passes_on_the_error_of_a_broken_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_here.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    require("data", "broken_here", "numpy")
    with pytest.raises(MissingExtra, match=r"nowhere_at_all: .*pip install -e '.*\[data\]'"):
        require("data", "broken_here", "nowhere_at_all")
    assert issubclass(MissingExtra, LinearSRError) and issubclass(MissingExtra, ImportError)


def test_importing_is_quick_and_loads_neither_torch_nor_ray(run: Run) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import linearsr; "
        "print(time.perf_counter() - began, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    lines = [run("python", "-c", code).stdout.split() for _ in range(3)]
    assert [loaded for _, *loaded in lines] == [["False", "False"]] * 3
    # This is the documented bound; an import takes a twentieth of it, even if the machine is busy.
    assert min(float(seconds) for seconds, *_ in lines) < 0.3


def _install_for_cpus(wheel: Path, folder: Path) -> None:
    """Install the wheel and PyTorch without CUDA into an environment; skip if there is no such."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    options = {"capture_output": True, "text": True}
    uv = ("uv", "pip", "install", "--python", python, "--torch-backend=cpu", wheel)
    tried = subprocess.run(
        [sys.executable, "-m", *uv], **options, env=_environment(UV_HTTP_TIMEOUT="60")
    )
    if tried.returncode == 0:
        return
    # A build that lies on this machine, or in a place that pip is configured to look at.
    pip = ("pip", "install", f"torch=={CPU_BUILD}", wheel)
    again = subprocess.run([python, "-m", *pip], **options, env=_environment())
    if "No matching distribution found for torch" in again.stderr:
        pytest.skip(f"neither PyTorch's index nor pip has torch for CPUs: {tried.stderr[-300:]}")
    assert again.returncode == 0, again.stderr


@pytest.mark.thorough
def test_base_install_for_cpus_takes_less_than_1_3_gb(wheel: Path, tmp_path: Path) -> None:
    _install_for_cpus(wheel, tmp_path / "venv")
    listed = subprocess.run(
        [tmp_path / "venv" / "bin" / "linearsr", "models"],
        capture_output=True,
        text=True,
        env=_environment(),
        cwd=tmp_path,
    )
    assert "linearsr-tiny" in listed.stdout, listed.stderr
    files = [file for file in (tmp_path / "venv").rglob("*") if not file.is_symlink()]
    size = sum(file.stat().st_blocks * 512 for file in files)
    print(f"the base install for CPUs takes {size / 1e9:.2f} GB")
    assert size < 1.3e9
    assert not [file for file in files if file.name.startswith("libcu")]


def test_the_base_install_upscales_to_the_same_bytes(
    run: Run, photograph: Image.Image, tmp_path: Path
) -> None:
    photograph.save(tmp_path / "photo.png")
    installed = run("python", "-c", "import linearsr; print(linearsr.__file__)").stdout
    assert not Path(installed).is_relative_to(ROOT)
    assert run("python", "-c", "import ray").returncode == 1
    assert run("python", "-c", "import skimage").returncode == 1
    assert "upscale" in run("linearsr", "--help").stdout
    assert "linearsr-tiny" in run("linearsr", "models").stdout
    done = run("linearsr", "upscale", "photo.png", "-o", "clean.png")
    assert done.returncode == 0, done.stderr
    here = [sys.executable, "-m", "linearsr.cli", "upscale", "photo.png", "-o", "here.png"]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(here, cwd=tmp_path, env=path, check=True, capture_output=True)
    assert (tmp_path / "clean.png").read_bytes() == (tmp_path / "here.png").read_bytes()


TRAINING = ("--data=d", "--validation=v", "--storage=s")


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("serve", ["linearsr", "serve"]),
        ("evaluation", ["linearsr", "evaluate", "--hr=photos", "-o=report"]),
        ("tags", ["linearsr", "tag", "photo.png"]),
        ("data", ["python", ROOT / "ray_jobs/build_shards.py", "--input=i", "--output=o"]),
        ("data", ["python", ROOT / "ray_jobs/tag_dataset.py", "--input=i", "--output=o"]),
        ("data", ["python", ROOT / "ray_jobs/upscale_dataset.py", "--input=i", "--output=o"]),
        ("data", ["linearsr", "job", "upscale-dataset", "--input=i", "--output=o"]),
        ("train", ["linearsr", "job", "pretrain", *TRAINING]),
        ("data", ["python", ROOT / "ray_jobs/evaluate.py", "--hr=photos", "-o=report"]),
        ("serve", ["python", ROOT / "ray_jobs/deploy.py"]),
        ("train", ["python", ROOT / "ray_jobs/pretrain.py", *TRAINING]),
        ("train", ["python", ROOT / "ray_jobs/finetune_experts.py", *TRAINING, "--from=r"]),
    ],
)
def test_a_missing_extra_is_named_in_one_line(run: Run, extra: str, command: list[object]) -> None:
    program, *arguments = command
    done = run(str(program), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("linearsr: ") and line.endswith(f"pip install 'linearsr[{extra}]'")


def test_importing_the_cluster_says_which_extra_to_add(run: Run) -> None:
    done = run("python", "-c", "import linearsr.distributed")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'linearsr[data]'")
