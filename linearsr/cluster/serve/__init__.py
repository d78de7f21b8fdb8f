"""Ray Serve: an HTTP ingress, a router, and the experts of a model as replicas of their own."""

from linearsr.errors import require

require("serve", "fastapi_offline", "python_multipart", "sse_starlette", "tenacity")

from linearsr.cluster.serve.app import build_app  # noqa: E402
from linearsr.cluster.serve.config import ServeConfig  # noqa: E402

__all__ = ["ServeConfig", "build_app"]
