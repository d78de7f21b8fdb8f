"""Ray Serve: an HTTP ingress, a router, and the experts of a model as replicas of their own."""

from linearsr.cluster.serve.app import build_app
from linearsr.cluster.serve.config import ServeConfig

__all__ = ["ServeConfig", "build_app"]
