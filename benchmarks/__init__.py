"""Measurements behind the numbers in the README and the model card."""
