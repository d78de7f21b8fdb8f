"""Progress on stderr: a bar on a terminal, or else a line every ten seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from linearsr.errors import printable

# Seconds between two lines, and between two updates of the bar's clock.
LINE_EVERY, CLOCK_EVERY = 10.0, 1.0


class Display:
    """Shows what is being done, the share that is done, and the time passed and left.

    Use it in a `with` statement. On a terminal the bar appears at once. Elsewhere the first line is
    printed at the first `show`, or after ten seconds without one.
    """

    def __init__(self, text: str, *, share: bool = True) -> None:
        """Start with a text that says what is being done.

        share: whether the share that is done will be known; without it, only the time is shown.
        """
        self._text, self._fraction = text, 0.0
        self._format = "{desc} {percentage:3.0f}% |{bar}| " if share else "{desc}, "
        self._began = time.monotonic()
        # When work began whose speed tells the time left, and the share that was done by then.
        self._measured_from: tuple[float, float] | None = None
        self._printed = False
        self._bar: Any = None
        if sys.stderr.isatty():
            # With the size of its own, tqdm draws nothing on a terminal that does not know its.
            size = {"ncols": _columns(), "nrows": 24}
            self._bar = tqdm(total=1.0, file=sys.stderr, leave=False, bar_format="{desc}", **size)
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Display:
        self._draw()
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar and print no further lines."""
        self._closed.set()
        if self._bar is not None:
            self._bar.close()

    def show(self, text: str, fraction: float) -> None:
        """Say what is being done, and the share of all work that is done, 0 to 1."""
        if self._measured_from is None:
            self._measured_from = time.monotonic(), fraction
        self._text, self._fraction = text, fraction
        if self._bar is not None:
            self._draw()
        elif not self._printed:
            self._print()

    def cleared(self) -> AbstractContextManager[object]:
        """Return a context in which others may print: the bar is out of their way."""
        context: AbstractContextManager[object] = tqdm.external_write_mode(file=sys.stderr)
        return context

    def _tick(self) -> None:
        every = LINE_EVERY if self._bar is None else CLOCK_EVERY
        while not self._closed.wait(every):
            if self._bar is None:
                self._print()
            else:
                self._draw()

    def _draw(self) -> None:
        if self._bar is None or self._closed.is_set():
            return
        passed, left = self._times()
        with self._bar.get_lock():
            self._bar.bar_format = self._format + passed + left
            self._bar.ncols, self._bar.n = _columns(), self._fraction
            self._bar.set_description_str(printable(self._text), refresh=False)
            self._bar.refresh()

    def _print(self) -> None:
        self._printed = True
        share = "" if self._measured_from is None else f"{100 * self._fraction:.0f}%, "
        line = f"linearsr: {share}{printable(self._text)}, {''.join(self._times())}"
        print(line, file=sys.stderr, flush=True)

    def _times(self) -> tuple[str, str]:
        """Return the time that has passed and the time left, which is empty if it is unknown."""
        now = time.monotonic()
        passed = f"{tqdm.format_interval(now - self._began)} passed"
        if self._measured_from is None:
            return passed, ""
        began, before = self._measured_from
        done = self._fraction - before
        if done <= 0:
            return passed, ""
        left = (now - began) / done * (1 - self._fraction)
        return passed, f", about {tqdm.format_interval(left)} left"


def _columns() -> int:
    """Return the width of the terminal less one, as in the last column some begin a new line."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return (columns or 80) - 1
