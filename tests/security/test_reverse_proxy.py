"""The configuration of nginx in `deploy`, in a real nginx before the endpoint's API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from linearsr.web.guard import UploadLimits
from tests.helpers.fleet_files import TOP
from tests.helpers.local_service import Local, served
from tests.helpers.processes import free_port, until

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
CONFIG = TOP / "deploy" / "nginx.conf"
# The configuration that includes the file where nginx is installed, with all files in one folder.
AROUND = """
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include {config};
}}
"""
LIMITS = UploadLimits(count=64)


def certificate(folder: Path) -> None:
    """Write a certificate and its key for example.org."""
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=example.org", "-addext", "subjectAltName=DNS:example.org,IP:127.0.0.1"]
    files = ["-keyout", "key.pem", "-out", "certificate.pem"]
    command = ["openssl", "req", *kind, *names, *files]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


class Proxy:
    """A running nginx: its port, and the folder with its certificate and temporary files."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port, self.folder = port, folder
        self.url = f"https://127.0.0.1:{port}"
        self.session = requests.Session()
        # Variables such as REQUESTS_CA_BUNDLE would replace `verify`.
        self.session.trust_env = False
        self.session.verify = str(folder / "certificate.pem")

    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.folder / "certificate.pem")

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return self.trusted().wrap_socket(plain, server_hostname="example.org")

    def status_of(self, request: bytes) -> bytes:
        """Return the status of a request that nginx may refuse while it is sent.

        asyncio reads the answer even if nginx has closed the connection; an SSLSocket does not.
        """

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.trusted(), server_hostname="example.org"
            )
            writer.write(request)
            answer = await asyncio.wait_for(reader.readexactly(12), 30)
            writer.transport.abort()
            return answer

        version, status = asyncio.run(ask()).split()
        assert version == b"HTTP/1.1"
        return status


@contextlib.contextmanager
def proxied(url: str, folder: Path) -> Iterator[Proxy]:
    """Run nginx before the endpoint at `url` with the file in `deploy`, but for its addresses."""
    assert NGINX
    port = free_port()
    certificate(folder)
    text = CONFIG.read_text()
    for ours, here in (
        ("127.0.0.1:8000", url.removeprefix("http://")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/certs/example.org.pem", f"{folder}/certificate.pem"),
        ("/etc/ssl/private/example.org.key", f"{folder}/key.pem"),
    ):
        assert text.count(ours) == 1, ours
        text = text.replace(ours, here)
    (folder / "linearsr.conf").write_text(text)
    (folder / "nginx.conf").write_text(AROUND.format(config=folder / "linearsr.conf"))
    nginx = subprocess.Popen([NGINX, "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"])
    try:
        until(lambda: listens(port) or nginx.poll() is not None, "nginx")
        assert nginx.poll() is None
        yield Proxy(port, folder)
    finally:
        nginx.terminate()
        nginx.wait(30)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def proxy(service: Local, tmp_path: Path) -> Iterator[Proxy]:
    if NGINX is None:
        if os.environ.get("CI"):
            pytest.fail("nginx is not installed, and CI does not skip it")
        pytest.skip("nginx is not on the path")
    with served(service, uploads=LIMITS) as url, proxied(url, tmp_path) as proxy:
        yield proxy


def test_progress_and_pixels_come_through_as_from_the_endpoint(
    proxy: Proxy, service: Local, png: bytes
) -> None:
    """The first event arrives while the service waits before its first expert."""
    form = {"files": {"image": ("x.png", png)}, "data": {"steps": 1, "format": "png"}}
    events = {"Accept": "text/event-stream"}
    with service.held():
        address = f"{proxy.url}/v1/upscale"
        answer = proxy.session.post(address, headers=events, stream=True, timeout=60, **form)
        lines = answer.iter_lines(chunk_size=None)
        assert next(lines) == b"event: progress"
    assert b"event: result" in list(lines)
    with served(service) as url:
        direct = requests.post(f"{url}/v1/upscale", timeout=60, **form)
    through = proxy.session.post(address, timeout=60, **form)
    assert through.status_code == direct.status_code == 200
    assert through.content == direct.content
    assert proxy.session.get(f"{proxy.url}/", timeout=60).text.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Many: a\r\n" * 9_000 + b"\r\n", b"431"),
        (b"GET /healthz?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
    ],
    ids=["one long header", "many headers", "a long URL"],
)
def test_long_headers_are_refused_by_nginx(proxy: Proxy, request_: bytes, status: bytes) -> None:
    assert proxy.status_of(request_) == status


def test_slow_uploads_of_one_client_reach_no_endpoint_and_leave_health_and_page(
    proxy: Proxy, service: Local, png: bytes
) -> None:
    head = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(proxy.connect()) for _ in range(16)]
        for connection in slow:
            connection.sendall(head + bytes(9))
        form = {"files": {"image": ("x.png", png)}, "data": {"steps": 1}}
        until(
            lambda: (
                proxy.session.post(f"{proxy.url}/v1/upscale", timeout=60, **form).status_code == 429
            ),
            "the seventeenth upload to be refused",
        )
        before = service.requests
        for path in ("/", "/healthz"):
            assert proxy.session.get(f"{proxy.url}{path}", timeout=60).status_code == 200
        assert service.requests == before
    until(
        lambda: (
            proxy.session.post(f"{proxy.url}/v1/upscale", timeout=60, **form).status_code == 200
        ),
        "an upload after the slow ones have gone",
    )


def test_body_beyond_the_limit_is_refused_by_nginx(proxy: Proxy) -> None:
    request = b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n"
    assert proxy.status_of(request) == b"413"
