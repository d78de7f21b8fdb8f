"""Requests share the memory of a router, and none is overtaken for ever."""

from __future__ import annotations

import asyncio

import pytest

from linearsr.distributed.serve.budget import MemoryBudget
from linearsr.errors import TooLarge


def test_requests_enter_in_order_while_their_memory_fits() -> None:
    async def converse() -> None:
        budget, entered = MemoryBudget(10), []
        leave = {name: asyncio.Event() for name in "abcd"}

        async def request(name: str, needed: int) -> None:
            async with budget.reserve(needed):
                entered.append(name)
                await leave[name].wait()

        tasks = [
            asyncio.create_task(request(*each)) for each in zip("abcd", (6, 4, 8, 1), strict=True)
        ]
        await asyncio.sleep(0)
        assert entered == ["a", "b"]
        leave["b"].set()
        await tasks[1]
        for _ in range(5):
            await asyncio.sleep(0)
        # The fourth would fit, but it is the third one's turn.
        assert entered == ["a", "b"] and budget.free == 4
        tasks[2].cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert entered == ["a", "b", "d"] and budget.free == 3
        for event in leave.values():
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.free == 10

    asyncio.run(converse())


def test_request_that_never_fits_is_refused() -> None:
    async def converse() -> None:
        budget = MemoryBudget(10)
        with pytest.raises(TooLarge, match=r"more than the 0\.0 GiB"):
            async with budget.reserve(11):
                pass
        assert budget.free == 10

    asyncio.run(converse())
