"""The memory of a router: requests enter while theirs fits, and otherwise wait in line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from linearsr.errors import TooLarge

GIB = 2**30


class MemoryBudget:
    """A number of bytes that requests share."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        # The first in line waits for room, and the others for their turn: so none is overtaken for
        # ever by smaller ones.
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def reserve(self, needed: int) -> AsyncIterator[None]:
        """Wait until `needed` bytes are free, and hold them. Raises TooLarge if they never are."""
        if needed > self.total:
            raise TooLarge(
                f"the picture needs about {needed / GIB:.1f} GiB of memory, more than the "
                f"{self.total / GIB:.1f} GiB that one request may have here; crop it or make it "
                "smaller"
            )
        async with self._turn:
            while needed > self.free:
                self._freed.clear()
                await self._freed.wait()
            self.free -= needed
        try:
            yield
        finally:
            self.free += needed
            self._freed.set()
