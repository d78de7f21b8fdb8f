"""pyvips, without its log in Python.

pyvips hands libvips' messages to Python's logging. While a message is logged, Python may free
another damaged image, whose own message GLib takes for a recursion that it ends with an abort of
the process. Errors are raised either way; the warnings say nothing that `imaging.files` does not.
"""

from __future__ import annotations

import os

# libvips reads this when it is loaded, and then prints no warnings on stderr.
os.environ.setdefault("VIPS_WARNING", "0")

import pyvips  # type: ignore[import-untyped]

# There is no public function for it, and no option at import.
pyvips._remove_log_handler()

__all__ = ["pyvips"]
