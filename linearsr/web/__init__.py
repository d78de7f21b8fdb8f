"""Upscaling over HTTP: the interface, its page, and what it asks of who does the work.

Knows nothing of Ray: `linearsr.distributed.serve` puts a fleet behind it.
"""
