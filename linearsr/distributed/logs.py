"""What Ray tells, made short."""

from __future__ import annotations

import logging


def quiet_data() -> None:
    """No bars and no execution plans of Ray Data: jobs draw one bar of their own."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def last_line(error: Exception) -> str:
    """What was raised in an actor: Ray puts it last, below the actor's stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
