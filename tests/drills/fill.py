"""A job that fills the object store of every node, and more, and holds on to it all."""

from __future__ import annotations

import threading

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Small ones at the end leave no room for a latent of 150 kB.
LARGE, SMALL = 2**20, 2**16


@ray.remote(num_cpus=0)
class Holder:
    """Arrays that are mapped where they lie: what is read cannot be spilled."""

    def __init__(self) -> None:
        self.held: list[np.ndarray] = []

    def fill(self, size: int) -> int:
        """Bytes that are held in the end: more than `size`, so the last ones are on the disk."""
        pieces = [LARGE] * (size // LARGE + 1) + [SMALL] * (LARGE // SMALL)
        for piece in pieces:
            self.held.append(ray.get(ray.put(np.ones(piece, np.uint8))))
        return sum(pieces)


def main() -> None:
    """Fill, tell, wait."""
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
