"""Measurements behind the numbers in the README, the pages and the model card.

`python -m benchmarks` measures the speed on this machine, side by side with the models that people
would use instead; the other modules answer one question each (`python -m benchmarks.NAME --help`).
"""
