"""Run a request until its result, its deadline, or the end of its connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect

from linearsr.web.service import Events, Result, TookTooLong
from linearsr.web.upload import Form, Received, receive

Value = TypeVar("Value")


async def accept(
    request: Request, kind: type[Form], *, progress: bool = False
) -> tuple[Received[Form], Events]:
    """Receive an upload; return it and the events of its request, which begins with the first.

    Raises InputError, OptionError, HTTPException, TookTooLong or ClientDisconnect.
    """
    received, deadline = await receive_in_time(request, kind)
    upscaling = replace(received.request, progress=progress)
    return received, in_time(request.app.state.service.upscale(upscaling), deadline)


async def receive_in_time(request: Request, kind: type[Form]) -> tuple[Received[Form], float]:
    """Receive an upload; return it and its request's deadline, a time of `anyio.current_time`.

    Raises InputError, OptionError, HTTPException, TookTooLong or ClientDisconnect.
    """
    state = request.app.state
    deadline = anyio.current_time() + state.limits.seconds
    # The form is read here: FastAPI would read all of it before it checks the token.
    form = receive(request, state.limits, state.service.models()[0], kind)
    return await before(deadline, form), deadline


async def before(deadline: float, work: Awaitable[Value]) -> Value:
    """Await `work`. Raises TookTooLong after the deadline, a time of `anyio.current_time`."""
    with anyio.CancelScope(deadline=deadline):
        return await work
    raise TookTooLong("the request took too long; send a smaller picture or use fewer steps")


async def in_time(events: Events, deadline: float) -> Events:
    """Yield the events up to the result. Raises TookTooLong after the deadline.

    The service is closed before the result is yielded: a client that reads slowly holds no slot.
    """
    async with aclosing(events):
        while not isinstance(event := await before(deadline, anext(events)), Result):
            yield event
    yield event


async def while_connected(request: Request, work: Awaitable[Value]) -> Value:
    """Await `work`; cancel it and raise ClientDisconnect if the client disconnects."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


async def result_of(events: Events) -> Result:
    """Return the last event, which is the result."""
    *_, last = [event async for event in events]
    assert isinstance(last, Result)
    return last
