"""Upscaling over HTTP: the API, its page, and the interface of the service behind them.

Imports no Ray: `linearsr.distributed.serve` implements that service on a cluster.
"""
