"""The same page, served while a run goes on: `hfedmoe watch RUN` and `hfedmoe run --live`.

It only reads the run's folder, so it works for the run of another process as well. A page knows the state of the folder
that it shows. It is told by server-sent events that there is a newer one, and then loads itself again.
"""

import asyncio
import hmac
import ipaddress
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.report.page.page import one_page
from hfedmoe.report.page.story import read_story
from hfedmoe.runs import about
from hfedmoe.wire import web
from hfedmoe.wire.web import listen

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOK_S = 0.5
"""Seconds between looks at the folder."""
SETTLE_S = 2.0
"""Seconds that a browser may take from what it got to its next request."""
GRACE_S = 30.0
"""Most seconds that open pages get to load the last state of a run that ended."""
COOKIE = "hfedmoe-token"


def listening(state: str) -> str:
    """The script of a page that shows this state: it loads itself again when there is another one.

    It asks first whether the server is still there: a page that is shown must not become a browser's error.
    """
    return f"""<script>
const changes = new EventSource("events?seen={state}");
changes.onmessage = () => fetch("", {{method: "HEAD"}}).then(() => location.reload(), () => {{}});
changes.addEventListener("end", () => changes.close());
</script>"""


@dataclass
class _Pages:
    """The page of a run, written anew only when the run went on; and who looks at it now."""

    run: Path
    ended: bool = False
    """Whether the run is over and all of it is written."""
    _shown: str = ""
    _page: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _busy: int = 0
    """Requests that are answered now, and pages that listen."""
    _told: float = -SETTLE_S
    """When a browser last got a page, or was told of a change; on the clock of `time.monotonic`."""

    def state(self) -> str:
        """What grows when a page would show something else: the bytes of its two files."""
        return "-".join(str(_size(self.run / name)) for name in ("metrics.jsonl", about.ANSWERS))

    def page(self) -> str:
        """The page of what is there now."""
        with self._lock:
            state = self.state()  # before the files are read: what is written meanwhile is another state
            if state != self._shown:
                try:
                    story = read_story(self.run)
                    live = listening(state)
                    self._page = one_page([story], live) if story.points else _waiting(self.run, state)
                except UserError as error:
                    self._page = _waiting(self.run, state, str(error))
                self._shown = state
            return self._page

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request that is answered, or a page that listens, until the block ends."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    def told(self) -> None:
        """A browser got something upon which it asks for more."""
        self._told = time.monotonic()

    def wait(self, seconds: float) -> None:
        """After the end of the run: wait until no page is behind, at most so long."""
        self.ended = True
        until = time.monotonic() + seconds
        while time.monotonic() < until and (self._busy or time.monotonic() - self._told < SETTLE_S):
            time.sleep(0.05)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _waiting(run: Path, state: str, problem: str = "") -> str:
    text = problem or f"{run}: no round is complete yet. This page shows itself when one is."
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>hfedmoe</title>'
        f"<p>{escape(text)}</p>{listening(state)}</html>"
    )


def app_for(pages: _Pages, hosts: list[str], token: str | None = None) -> "Starlette":
    """The pages as a web application that changes nothing.

    Args:
        hosts: names by which a browser may ask for it; "*": any. Otherwise a page of the web could read it, once the
            owner of that page says that its own name is an address of this machine.
        token: what a browser must show, as `?token=` or as the cookie that it then gets; None: nobody must.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    def refused(request: "Request") -> "Response | None":
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if token is None or hmac.compare_digest(given.encode(), token.encode()):
            return None
        return PlainTextResponse("This page needs its token: open the whole address that was printed.\n", 403)

    async def page(request: "Request") -> "Response":
        answer = refused(request)
        if answer is not None:
            return answer
        with pages.busy():
            made = HTMLResponse(await asyncio.to_thread(pages.page), headers={"Cache-Control": "no-store"})
            pages.told()
        if token is not None:
            made.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return made

    async def changes(request: "Request") -> AsyncIterator[str]:
        seen = request.query_params.get("seen") or pages.state()
        with pages.busy():
            yield ": here\n\n"
            while not await request.is_disconnected():
                ended, state = pages.ended, pages.state()  # in this order: the state of a run that ended is its last
                if state != seen:
                    seen = state
                    pages.told()
                    yield "data: round\n\n"
                elif ended:
                    yield "event: end\ndata: end\n\n"
                    return
                await asyncio.sleep(LOOK_S)

    async def events(request: "Request") -> "Response":
        return refused(request) or StreamingResponse(changes(request), media_type="text/event-stream")

    known = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return Starlette(routes=[Route("/", page), Route("/events", events)], middleware=[known])


@contextmanager
def served(run: Path, host: str, port: int, grace_s: float = 0.0) -> Iterator[str]:
    """Serve the page of a run during the block; yields its address.

    Args:
        host: the address of this machine to listen on. On another than loopback's, the page asks for a token, which is
            part of the yielded address.
        port: 0 takes a free one.
        grace_s: most seconds after the block, which ends with the run, in which open pages load its last state. 0:
            the run may go on, and so pages try to reach the server again.

    Raises:
        UserError: the address or port cannot be used.
    """
    token = None if _is_loopback(host) else secrets.token_urlsafe(16)
    socket = listen(host, port, "try --port 0")
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{socket.getsockname()[1]}/" + (f"?token={token}" if token else "")
    pages = _Pages(run)
    app = app_for(pages, _hosts(host), token)
    with web.served(app, socket, "the live page did not start", lifespan="off", timeout_graceful_shutdown=1):
        yield address
        if grace_s:
            pages.wait(grace_s)


def _hosts(host: str) -> list[str]:
    """The names by which a browser may ask for what listens on an address."""
    # "[" is what the middleware makes of any IPv6 address: that is no name, which somebody could own.
    names = [host.lower(), f"[{host}]", "["]
    if _is_loopback(host):
        return [*names, "localhost", "127.0.0.1", "[::1]"]
    try:
        return ["*"] if ipaddress.ip_address(host).is_unspecified else names  # with "*" the token alone decides
    except ValueError:
        return names


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
