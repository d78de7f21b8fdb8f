"""A real S3 server on loopback: OpenStack Swift with its S3 API, from an environment of its own.

The tests start one for themselves. `make s3` runs one in the foreground for those without a bucket:
`python -m tools.s3_server --folder .s3 --port 9000`.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET, REGION = "test:tester", "testing", "us-east-1"
HOST = "127.0.0.1"
# Runs a server, and ends its process group when its parent has ended or was killed, since the pipe
# to its standard input closes then.
GUARD = 'exec 3<&0; (read _ <&3; kill 0) & exec "$@" 3<&- </dev/null'
# Below the ephemeral ports of outgoing connections, above the ports of Ray's workers.
PORTS = range(20000, 32000)
STARTS_WITHIN, STOPS_WITHIN = 120.0, 20.0
BIN = Path(__file__).parents[1] / ".venv-s3" / "bin"

# One disk and one copy. The hash and the partitions stay the same, so data survive a restart on
# other ports.
RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(("object", "container", "account"), sys.argv[2:]):
    builder = RingBuilder(4, 1, 0)
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port),
                     "replication_ip": "127.0.0.1", "replication_port": int(port),
                     "device": "d1", "weight": 1.0, "meta": ""})
    builder.rebalance(seed=0)
    builder.get_ring().save(f"{sys.argv[1]}/{name}.ring.gz")
"""
SWIFT = """[swift-hash]
swift_hash_path_prefix = local
swift_hash_path_suffix = local
[storage-policy:0]
name = default
default = yes
"""
COMMON = """[DEFAULT]
bind_ip = {host}
bind_port = {port}
user = {user}
swift_dir = {folder}/conf
devices = {folder}/node
mount_check = false
workers = 0
fallocate_reserve = 0
log_level = WARNING
log_address = /nonexistent
max_clients = 256
"""
BACKEND = """[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
recon_cache_path = {folder}/cache
recon_lock_path = {folder}/cache
container_update_timeout = 10
replication_server = false
"""
FILTERS = "catch_errors gatekeeper healthcheck listing_formats s3api tempauth copy slo symlink"
OPTIONS = {
    "s3api": f"location = {REGION}\nmax_bucket_listing = {{page}}\n",
    "tempauth": f"user_{KEY.replace(':', '_')} = {SECRET} .admin\n",
}
# {page} is the maximum number of keys in one listing.
PROXY = (
    f"[pipeline:main]\npipeline = {FILTERS} proxy-server\n"
    "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\n"
    "allow_account_management = true\nnode_timeout = 60\nrecoverable_node_timeout = 60\n"
    "conn_timeout = 5\nerror_suppression_limit = 1000000\n"
) + "".join(f"[filter:{n}]\nuse = egg:swift#{n}\n{OPTIONS.get(n, '')}" for n in FILTERS.split())


class SwiftError(RuntimeError):
    """Swift is not installed, or did not start."""


def free_port() -> int:
    """Return a port that nobody listens on and that no outgoing connection will take."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with contextlib.suppress(OSError):
            check_free(port)
            return port
    raise SwiftError(f"no free port among {PORTS}")


def check_free(port: int) -> None:
    """Raise OSError if somebody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))


def environment(port: int) -> dict[str, str]:
    """Return the environment variables by which any S3 client finds the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
    }


@contextlib.contextmanager
def running(folder: Path, port: int, *, page: int = 1000) -> Iterator[None]:
    """Run Swift at `port` inside a `with` statement; it stores its data in `folder`.

    One listing has at most `page` keys; on AWS and in Swift it is a thousand. Raises SwiftError
    with the servers' output if it cannot be started.
    """
    commands = _commands()
    folder = folder.absolute()
    ports = {"proxy": port, **{name: free_port() for name in ("object", "container", "account")}}
    for name, number in ports.items():
        try:
            check_free(number)
        except OSError as error:
            raise SwiftError(f"port {number}, for Swift's {name} server: {error}") from error
    _configure(folder, ports, commands, page)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        servers += [_start(name, folder, commands) for name in reversed(ports)]
        _wait(ports, servers, folder)
        yield
    finally:
        _stop(servers)


def _commands() -> Path:
    """Return the folder of Swift's commands. Raises SwiftError if there is none."""
    folder = Path(os.environ.get("LINEARSR_SWIFT_BIN") or BIN)
    if not (folder / "swift-proxy-server").exists():
        raise SwiftError(
            f"no Swift in {folder}: run `make s3-server`, which installs it, or let "
            "LINEARSR_SWIFT_BIN name the bin folder of an environment that has it"
        )
    return folder


def _configure(folder: Path, ports: dict[str, int], commands: Path, page: int) -> None:
    for name in ("conf", "node/d1", "log", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    conf = folder / "conf"
    (conf / "swift.conf").write_text(SWIFT)
    for name, port in ports.items():
        values = {"host": HOST, "port": port, "user": getpass.getuser(), "folder": folder}
        rest = (PROXY if name == "proxy" else BACKEND).format(name=name, folder=folder, page=page)
        (conf / f"{name}-server.conf").write_text(COMMON.format(**values) + rest)
    backends = [str(ports[name]) for name in ("object", "container", "account")]
    builder = subprocess.run(
        [commands / "python", "-W", "ignore", "-c", RINGS, conf, *backends],
        capture_output=True,
        text=True,
        check=False,
    )
    if builder.returncode:
        raise SwiftError(f"Swift cannot build its rings: {builder.stderr[-2000:]}")


def _start(name: str, folder: Path, commands: Path) -> subprocess.Popen[bytes]:
    """Start a server in its own session, since a Swift server that stops ends its process group."""
    with open(folder / "log" / f"{name}.log", "wb") as log:
        server = [commands / f"swift-{name}-server", folder / "conf" / f"{name}-server.conf"]
        return subprocess.Popen(
            ["sh", "-c", GUARD, "sh", *server],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ports: dict[str, int], servers: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not (all(map(_listening, ports.values())) and _healthy(ports["proxy"])):
        if time.monotonic() > deadline or any(s.poll() is not None for s in servers):
            logs = "\n".join(log.read_text()[-1000:] for log in (folder / "log").glob("*.log"))
            raise SwiftError(f"Swift did not start at port {ports['proxy']}:\n{logs}")
        time.sleep(0.05)


def _listening(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(servers: list[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        _signal(server, signal.SIGTERM)
    deadline = time.monotonic() + STOPS_WITHIN
    for server in servers:
        try:
            server.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(server, signal.SIGKILL)
            server.wait()
        assert server.stdin is not None
        server.stdin.close()


def _signal(server: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, number)


def main() -> None:
    """Run a server in the foreground until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="make s3", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".s3"), help="folder for the objects")
    parser.add_argument("--port", type=int, default=9000, help="port on 127.0.0.1")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        with running(options.folder, options.port):
            print("# S3 on this machine; paste this into another terminal:")
            for name, value in environment(options.port).items():
                print(f"export {name}={value}")
            print("# Ctrl-C stops the server; objects stay in", options.folder, flush=True)
            stop.wait()
    except SwiftError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
