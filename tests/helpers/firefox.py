"""Start Firefox for Playwright, which then need not be the newest one.

    python -m tests.helpers.firefox /usr/bin/firefox-esr ARGUMENTS

Playwright speaks WebDriver BiDi with an unpatched Firefox, and sends commands that Debian's Firefox
does not know yet. This process stands between the two and answers those itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

# Emulated media features; tests in Firefox have those of the machine.
UNKNOWN = {"emulation.setMediaFeaturesOverride"}
LISTENS = re.compile(r"WebDriver BiDi listening on (ws://\S+)")


def write_launcher(folder: Path, firefox: str) -> Path:
    """Write a program that Playwright can start as its Firefox; return its path."""
    path = folder / "firefox"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{firefox}" "$@"\n')
    path.chmod(0o755)
    return path


async def main(firefox: str, *arguments: str) -> int:
    """Run Firefox until it ends; return its exit code."""
    process = await asyncio.create_subprocess_exec(
        firefox, *arguments, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async for line in process.stderr:
        text = line.decode(errors="replace")
        if found := LISTENS.search(text):
            text = text.replace(found[1], await listen(found[1]))
        print(text, end="", file=sys.stderr, flush=True)
    return await process.wait()


async def listen(address: str) -> str:
    """Accept connections for the BiDi server at `address`; return the address of this one."""

    async def relay(request: web.Request) -> web.WebSocketResponse:
        near = web.WebSocketResponse(max_msg_size=0)
        await near.prepare(request)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address + request.path, max_msg_size=0) as far,
        ):
            answers = asyncio.create_task(pass_on(far, near))
            async for message in near:
                command = json.loads(message.data)
                if command["method"] in UNKNOWN:
                    await near.send_json({"type": "success", "id": command["id"], "result": {}})
                else:
                    await far.send_str(message.data)
            answers.cancel()
        return near

    app = web.Application()
    app.router.add_get("/{path:.*}", relay)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    return f"ws://{host}:{port}"


async def pass_on(far: aiohttp.ClientWebSocketResponse, near: web.WebSocketResponse) -> None:
    """Send what Firefox says to Playwright."""
    async for message in far:
        await near.send_str(message.data)
    await near.close()


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(*sys.argv[1:])))
