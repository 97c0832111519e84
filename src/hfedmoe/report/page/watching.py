"""The same page, served while a run goes on: `hfedmoe watch RUN` and `hfedmoe run --live`.

It only reads the run's folder, so it works for the run of another process as well. A browser is told by server-sent
events that a round is complete, and loads the page again.
"""

import asyncio
import hmac
import ipaddress
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hfedmoe.errors import UserError
from hfedmoe.report.page.page import one_page
from hfedmoe.report.page.story import read_story
from hfedmoe.wire import web
from hfedmoe.wire.web import listen

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOK = 0.5
"""Seconds between looks at the folder."""
COOKIE = "hfedmoe-token"


@dataclass
class _Pages:
    """The page of a run, written anew only when a round was added."""

    run: Path
    _seen: int = -1
    _page: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def size(self) -> int:
        """Bytes of metrics.jsonl: it grows with every round."""
        try:
            return (self.run / "metrics.jsonl").stat().st_size
        except OSError:
            return 0

    def page(self) -> str:
        """The page of what is there now."""
        with self._lock:
            size = self.size()
            if size != self._seen or not self._page:
                try:
                    story = read_story(self.run)
                    self._page = one_page([story], live=True) if story.points else _waiting(self.run)
                except UserError as error:
                    self._page = _waiting(self.run, str(error))
                self._seen = size
            return self._page


def _waiting(run: Path, problem: str = "") -> str:
    text = problem or f"{run}: no round is complete yet. This page shows itself when one is."
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>hfedmoe</title>'
        f'<p>{escape(text)}</p><script>new EventSource("events").onmessage = () => location.reload()</script></html>'
    )


def app_for(run: Path, token: str | None = None) -> "Starlette":
    """The pages as a web application that changes nothing.

    Args:
        token: what a browser must show, as `?token=` or as the cookie that it then gets; None: nobody must.
    """
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    pages = _Pages(run)

    def refused(request: "Request") -> "Response | None":
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if token is None or hmac.compare_digest(given.encode(), token.encode()):
            return None
        return PlainTextResponse("This page needs its token: open the whole address that was printed.\n", 403)

    async def page(request: "Request") -> "Response":
        answer = refused(request)
        if answer is not None:
            return answer
        made = HTMLResponse(await asyncio.to_thread(pages.page), headers={"Cache-Control": "no-store"})
        if token is not None:
            made.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return made

    async def changes(request: "Request") -> AsyncIterator[str]:
        size = pages.size()
        yield ": here\n\n"
        while not await request.is_disconnected():
            await asyncio.sleep(LOOK)
            if pages.size() != size:
                size = pages.size()
                yield "data: round\n\n"

    async def events(request: "Request") -> "Response":
        return refused(request) or StreamingResponse(changes(request), media_type="text/event-stream")

    return Starlette(routes=[Route("/", page), Route("/events", events)])


@contextmanager
def served(run: Path, host: str, port: int) -> Iterator[str]:
    """Serve the page of a run during the block; yields its address.

    Args:
        host: the address of this machine to listen on. On another than loopback's, the page asks for a token, which is
            part of the yielded address.
        port: 0 takes a free one.

    Raises:
        UserError: the address or port cannot be used, or the extra `live` is not installed.
    """
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise UserError('the live page needs uvicorn and starlette: pip install "hfedmoe[live]"')
    token = None if _is_loopback(host) else secrets.token_urlsafe(16)
    listening = listen(host, port, "try --port 0")
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    app = app_for(run, token)
    with web.served(app, listening, "the live page did not start", lifespan="off", timeout_graceful_shutdown=1):
        yield address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
