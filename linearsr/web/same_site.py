"""Keep pages of other sites from spending the work of an endpoint that asks for no token.

A browser sends a page's requests to any address, loopback included, and names the page's origin.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from linearsr.web.problems import error_response

# Methods that change nothing, so that any page may use them.
SAFE = ("GET", "HEAD", "OPTIONS")


class SameSite:
    """An ASGI middleware that refuses requests of other sites with 403, and of odd hosts with 400.

    open: whether uploads need no token; with one, a page of another site cannot know it. origins:
    other origins that are let in, "*" for all. hosts: the names that the Host header may have,
    empty or "*" for any. A name that an attacker's DNS server points here is none of them.
    """

    def __init__(
        self, app: ASGIApp, *, open: bool, origins: Collection[str], hosts: Collection[str]
    ) -> None:
        self.app = app
        self.open = open
        self.origins = origins
        self.hosts = () if "*" in hosts else hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection or request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await error_response(scope["path"], *refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts and _name(f"//{host}") not in self.hosts:
            names = ", ".join(self.hosts)
            return 400, f"the host {host!r} is none of {names}; see allowed_hosts"
        if not self.open or scope["method"] in SAFE or "*" in self.origins:
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self.origins:
            return None
        # Pages cannot choose Sec-Fetch-Site, but older browsers lack it. A proxy may change Host.
        own = origin is None or origin.partition("://")[2] == host
        if site in ("same-origin", "none") or (own and site is None):
            return None
        return 403, "a page of another site may not use this endpoint; see cors_origins"


def _name(url: str) -> str | None:
    """Return the host of a URL in lower case, without brackets and port; None if there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
