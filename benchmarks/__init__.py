"""Measurements behind the numbers in the README, the pages and the model card.

`python -m benchmarks` is the speed of it all on this machine, side by side with what people would
pick instead; the other modules answer one question each (`python -m benchmarks.NAME --help`).
"""
