"""Stand-ins for programs that cannot run in a test; each checks its arguments."""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The condition that KubeRay sets when a resource can be reached.
CONDITIONS = {"raycluster": "condition=HeadPodReady", "rayservice": "condition=Ready"}


def pip(*arguments: str) -> None:
    """Resolve the requirements; fail for a package or an extra that does not exist."""
    command, *packages = arguments
    if command != "install":
        raise SystemExit(f"pip {command}: only install is known")
    uv = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--dry-run",
        "--offline",
        "--no-build-isolation",
    ]
    run = subprocess.run(
        [*uv, "--python", sys.executable, *packages], capture_output=True, text=True, check=False
    )
    if run.returncode or "does not have an extra" in run.stderr:
        raise SystemExit(run.stderr)


def make(*arguments: str) -> None:
    """Dry-run the target. `make s3` already runs, as the server of the pages."""
    if arguments != ("s3",):
        subprocess.run(["make", "--dry-run", *arguments], check=True, stdout=subprocess.DEVNULL)


def ray(verb: str, *arguments: str) -> None:
    """Let Ray parse the command of the launcher and check its file."""
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import cli

    options = cli.commands[verb].make_context(f"ray {verb}", list(arguments)).params
    validate_config(
        prepare_config(yaml.safe_load(Path(options["cluster_config_file"]).read_text()))
    )
    if verb == "exec":
        subprocess.run(["bash", "-c", options["cmd"]], check=True)


def docker(*arguments: str) -> None:
    """Check that the files exist and that the tag is the one that the fleet pulls."""
    parser, verbs = _verbs("docker")
    build = verbs.add_parser("build")
    build.add_argument("-f", "--file", type=_file, default="Dockerfile")
    build.add_argument("-t", "--tag", required=True)
    build.add_argument("--platform")
    build.add_argument("context", type=_folder)
    verbs.add_parser("push").add_argument("tag")
    options = parser.parse_args(arguments)
    _one_of(options.tag, {_yaml("cluster.yaml")["docker"]["image"]})


def helm(*arguments: str) -> None:
    """Parse the two commands that install an operator."""
    parser, verbs = _verbs("helm")
    repo = verbs.add_parser("repo").add_subparsers(required=True).add_parser("add")
    for name in ("name", "url"):
        repo.add_argument(name)
    install = verbs.add_parser("install")
    for name in ("name", "chart", "--version"):
        install.add_argument(name)
    parser.parse_args(arguments)


def kubectl(*arguments: str) -> None:
    """Check names against deploy/kubernetes/; the value of a Secret is an invented token."""
    options = _kubectl().parse_args(arguments)
    files = [path.read_text() for path in _manifests()]
    if options.verb == "get" and options.kind == "secret":
        options.kind = "raycluster"  # the operator makes a Secret with the name of the cluster
        print(base64.b64encode(b"0" * 64).decode(), end="")
    if options.verb == "get" and options.name:
        _one_of(f"{options.kind}/{options.name}", _names("{kind}/{name}"))
    elif options.verb == "create":
        key = options.from_literal.partition("=")[0]
        assert f"name: {options.name}, key: {key}" in "".join(files), f"nobody asks for {key}"
    elif options.verb == "wait":
        _one_of(options.target, _names("{kind}/{name}"))
        _one_of(options.condition, {CONDITIONS[options.target.split("/")[0]]})
    elif options.verb == "port-forward":
        services = _names("service/{name}-head-svc") | _names("service/{name}-serve-svc")
        _one_of(options.target, services)
    elif options.verb == "logs":
        assert f"name: {options.container}\n" in "".join(files), f"no container {options.container}"
        labels = dict(pair.split("=") for pair in options.selector.split(","))
        _one_of(f"raycluster/{labels['ray.io/cluster']}", _names("{kind}/{name}"))
        assert f"groupName: {labels['ray.io/group']}\n" in "".join(files), (
            f"no such group: {labels}"
        )


def _names(shape: str) -> set[str]:
    """Return the names of all manifests, formatted."""
    manifests = [_yaml(str(path)) for path in _manifests() if path.name != "kustomization.yaml"]
    return {shape.format(kind=m["kind"].lower(), name=m["metadata"]["name"]) for m in manifests}


def _manifests() -> list[Path]:
    return sorted(Path("deploy/kubernetes").rglob("*.yaml"))


def _kubectl() -> argparse.ArgumentParser:
    parser, verbs = _verbs("kubectl")
    source = verbs.add_parser("apply").add_mutually_exclusive_group(required=True)
    source.add_argument("-f", type=_file)
    source.add_argument("-k", type=_kustomization)
    get = verbs.add_parser("get")
    get.add_argument("kind")
    get.add_argument("name", nargs="?")
    get.add_argument("-o")
    get.add_argument("-w", "--watch", action="store_true")
    create = verbs.add_parser("create")
    create.add_argument("kind", choices=["secret"])
    create.add_argument("type", choices=["generic"])
    create.add_argument("name")
    create.add_argument("--from-literal", required=True)
    wait = verbs.add_parser("wait")
    wait.add_argument("target")
    wait.add_argument("--for", dest="condition", required=True)
    wait.add_argument("--timeout")
    forward = verbs.add_parser("port-forward")
    forward.add_argument("target")
    forward.add_argument("port", type=int)
    logs = verbs.add_parser("logs")
    logs.add_argument("-l", "--selector", required=True)
    logs.add_argument("-c", "--container", required=True)
    logs.add_argument("--prefix", action="store_true")
    return parser


def aws(*arguments: str) -> None:
    """Check the operation and its parameters; `s3 sync` really copies."""
    from botocore import xform_name
    from botocore.session import get_session

    service, operation, *flags = arguments
    if service == "s3":
        _sync(operation, *flags)
        return
    session = get_session()
    model = session.get_service_model(service)
    names = {xform_name(name, "-"): name for name in model.operation_names}
    if operation == "wait":
        waiters, (waiter, *flags) = session.get_waiter_model(service), flags
        (name,) = (n for n in waiters.waiter_names if xform_name(n, "-") == waiter)
        operation = xform_name(waiters.get_waiter(name).operation, "-")
    members = model.operation_model(names[operation]).input_shape.members
    parser = argparse.ArgumentParser(prog=f"aws {service} {operation}", allow_abbrev=False)
    for flag in ("region", "query", "output"):
        parser.add_argument(f"--{flag}")
    for name, shape in members.items():
        kind: dict[str, Any] = {"action": "store_true"} if shape.type_name == "boolean" else {}
        kind = {"nargs": "+"} if name == "Parameters" else kind
        parser.add_argument(f"--{xform_name(name, '-')}", **kind)
    options = vars(parser.parse_args(flags))
    if parameters := options.get("parameters"):
        template = options["template_body"] or "file://deploy/aws/account.yaml"  # the previous one
        text = _file(template.removeprefix("file://")).read_text()
        known = set(re.findall(r"^  (\w+):\n    Type: (?!AWS::)", text, re.M))
        for parameter in re.findall(r"ParameterKey=(\w+)", " ".join(parameters)):
            _one_of(parameter, known)


def hf(*arguments: str) -> None:
    """Let the real program parse the command; put stand-ins where it would put the files."""
    program = Path(sys.executable).with_name("hf")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if "offline mode is enabled" not in run.stderr:
        raise SystemExit(run.stderr)
    stand_ins = Path(os.environ["STAND_INS"])
    target = Path(arguments[arguments.index("--local-dir") + 1])
    if "gemma" in arguments[1]:
        shutil.copytree(stand_ins / "gemma", target)
    else:
        shutil.copytree(stand_ins / "sana", target)
        shutil.copytree(stand_ins / "dc-ae", target / "vae")


def _sync(verb: str, source: str, target: str) -> None:
    from linearsr.storage.location import locate

    assert verb == "sync", f"s3 {verb}: only sync is known"
    assert locate(source).files(), f"nothing in {source}"
    locate(source).copy_to(locate(target))


def _verbs(name: str) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:  # type: ignore[type-arg]
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    return parser, parser.add_subparsers(dest="verb", required=True)


def _file(path: str) -> Path:
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no {path}")
    return Path(path)


def _folder(path: str) -> Path:
    _file(f"{path}/pyproject.toml")
    return Path(path)


def _kustomization(path: str) -> Path:
    return _file(f"{path}/kustomization.yaml")


def _yaml(path: str) -> Any:
    import yaml

    return yaml.safe_load(Path(path).read_text())


def _one_of(name: str, known: set[str]) -> None:
    if name not in known:
        raise SystemExit(f"{name}: the project has {', '.join(sorted(known))}")


ALL: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (pip, make, ray, docker, helm, kubectl, aws, hf)
}
