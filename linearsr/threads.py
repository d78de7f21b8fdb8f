"""How the threads of OpenMP wait for each other; torch reads this setting when it loads.

Threads that spin while they wait keep a core busy that their own slowest thread may need: beside
other work a picture then takes many times as long as with one thread. Threads that go to sleep at
once must be woken for each of many short loops. docs/guides/speed.md has the cost of both.
"""

from __future__ import annotations

import os
import sys

# Rounds of GNU OpenMP's waiting loop before a thread sleeps: some tens of microseconds.
SPIN_ROUNDS = "10000"
# If one of these variables is set, the user has made a choice.
CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Have the threads of this process and its children spin briefly, then sleep.

    Sets GOMP_SPINCOUNT unless the user has set how threads wait. Does nothing once torch is loaded,
    because GNU OpenMP has read its environment by then. Other OpenMP libraries ignore the variable.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = SPIN_ROUNDS
