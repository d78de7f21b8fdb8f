"""A job that overfills the object store of every node and keeps the objects alive."""

from __future__ import annotations

import threading

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Small objects at the end leave no room for a latent of 150 kB.
LARGE, SMALL = 2**20, 2**16


@ray.remote(num_cpus=0)
class Holder:
    """An actor with arrays mapped from the object store; they cannot be spilled while mapped."""

    def __init__(self) -> None:
        self.held: list[np.ndarray] = []

    def fill(self, size: int) -> int:
        """Return the bytes that are held: more than `size`, so the last ones are on the disk."""
        pieces = [LARGE] * (size // LARGE + 1) + [SMALL] * (LARGE // SMALL)
        for piece in pieces:
            self.held.append(ray.get(ray.put(np.ones(piece, np.uint8))))
        return sum(pieces)


def main() -> None:
    """Fill every store, print the sizes, and wait."""
    ray.init()
    fillings = []
    holders = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            holders.append(Holder.options(scheduling_strategy=there).remote())
            size = int(node["Resources"]["object_store_memory"])
            fillings.append(holders[-1].fill.remote(size))
    print([f"{held >> 20} MiB" for held in ray.get(fillings)], "all are full", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
