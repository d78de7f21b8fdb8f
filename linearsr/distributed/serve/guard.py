"""The guard in the HTTP proxies of Ray Serve, which call `middlewares` when they start.

A proxy has the environment of its cluster's start: that of `linearsr serve`, or of `ray start`.
"""

from __future__ import annotations

import os
from typing import Any

from linearsr.distributed.compat import use_http_parser
from linearsr.errors import OptionError, one_line
from linearsr.web.guard import UploadLimits, guard
from linearsr.web.http_parser import LimitedH11
from linearsr.web.service import Limits
from linearsr.web.upload import FORM_OVERHEAD

# Ray Serve's variable for what `middlewares` is, and ours for the limits, as JSON.
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
UPLOADS = "LINEARSR_UPLOADS"


def middlewares() -> list[Any]:
    """Return the Starlette middlewares of a proxy. Raises OptionError for wrong limits."""
    use_http_parser(LimitedH11)
    return [guard(read_limits())]


def read_limits() -> UploadLimits:
    """Return the limits of uploads in the environment. Raises OptionError."""
    try:
        return UploadLimits.model_validate_json(os.environ.get(UPLOADS) or "{}")
    except ValueError as error:
        raise OptionError(f"{UPLOADS}: {one_line(error)}") from error


def guard_proxies(limits: Limits) -> None:
    """Let the proxies of a cluster that this process starts have the guard.

    limits: those of a request, for whose largest upload the guard leaves room. Raises OptionError
    if the environment has a callback of somebody else, since Serve takes one only.
    """
    ours = f"{__name__}.{middlewares.__name__}"
    if os.environ.get(CALLBACK, ours) != ours:
        raise OptionError(
            f"{CALLBACK} is {os.environ[CALLBACK]}, but the endpoint needs {ours} there; unset it, "
            "or let your function return these middlewares too and deploy ray_jobs/serve.yaml"
        )
    before = read_limits()
    body = max(before.body_bytes, limits.bytes + FORM_OVERHEAD)
    total = max(before.total_bytes, body)
    uploads = before.model_copy(update={"body_bytes": body, "total_bytes": total})
    os.environ[UPLOADS] = uploads.model_dump_json()
    os.environ[CALLBACK] = ours
