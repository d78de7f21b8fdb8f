"""The endpoint on Ray Serve: an HTTP ingress, a router, and a model's experts as replicas."""

from linearsr.errors import require

require("serve", "fastapi_offline", "python_multipart", "sse_starlette", "tenacity")

from linearsr.distributed.serve.build import build_app  # noqa: E402
from linearsr.distributed.serve.config import ServeConfig  # noqa: E402

__all__ = ["ServeConfig", "build_app"]
