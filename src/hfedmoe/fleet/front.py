"""The only part of a server that is reachable from outside: it passes what devices may send, and nothing else.

Flower's SuperLink has one port for everything, and checks keys only in the calls of devices. So it listens on
loopback, and this front, with TLS, hands it the calls of devices on the roster. Runs are started, nodes registered and
logs read on the server's own machine only.
"""

import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hfedmoe.errors import UserError
from hfedmoe.fleet.bodies import NotItsOwnError, TooLargeError, body, declared, own_answers
from hfedmoe.fleet.certificates import LOOPBACK
from hfedmoe.fleet.findings import MOST_BYTES, Report
from hfedmoe.fleet.findings import PATH as REPORT_PATH
from hfedmoe.fleet.folder import Folder
from hfedmoe.fleet.keys import sender
from hfedmoe.fleet.offer import PATH, VERSION_HEADER, Offer
from hfedmoe.fleet.roster import Invited, Roster
from hfedmoe.wire.web import listen, served

ANSWERS = "push-messages"
CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    ANSWERS,
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a SuperNode with a key calls. `register-node` is not among them: the roster says who is registered."""
_OF_ONE_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "server", "date"}
TIMEOUT_S = 60.0


@dataclass
class Seen:
    """What the front knows of a device."""

    at: float
    """Seconds since the epoch of its last call."""
    versions: str = ""
    """What it says it runs; empty: it has not said."""


@dataclass
class Board:
    """What the front reads, and what it writes down."""

    folder: Folder
    upstream: int | None = None
    """The SuperLink's port on loopback."""
    offer: Offer | None = None
    """The run that is served; None: none."""
    seen: dict[str, Seen] = field(default_factory=dict)
    """By the device's name."""
    reports: dict[str, Report] = field(default_factory=dict)
    """What devices found out about the run, by name."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why devices cannot take part, by name: they never get so far that they are asked who they are."""
    _read: tuple[int, dict[bytes, Invited]] = (-1, {})

    def invited(self) -> dict[bytes, Invited]:
        """The devices on the roster by key; it is read again when its file changed. Raises UserError."""
        try:
            changed = self.folder.roster.stat().st_mtime_ns
        except OSError as error:
            raise UserError(f"{self.folder.roster}: cannot be read ({error.strerror})") from None
        if changed != self._read[0]:
            self._read = changed, Roster.read(self.folder.roster).by_key()
        return self._read[1]

    def caller(self, request: Request) -> Invited | None:
        """The device that signed a request; None: nobody on the roster did."""
        key = sender(request.headers)
        device = None if key is None else self.invited().get(key)
        if device is not None:
            seen = self.seen.setdefault(device.name, Seen(0.0))
            seen.at = time.time()
            seen.versions = request.headers.get(VERSION_HEADER, seen.versions)[:80]
        return device

    def fits_versions(self, request: Request, device: Invited) -> bool:
        """Whether a device has the server's versions; if not, it is noted."""
        assert self.offer is not None
        theirs = request.headers.get(VERSION_HEADER, "")[:80]
        if theirs == self.offer.versions:
            return True
        theirs = "".join(letter for letter in theirs if letter.isprintable()) or "an earlier hfedmoe"
        self.refused[device.name] = f"it has {theirs}, the server {self.offer.versions}; install the server's versions"
        return False

    def take(self, device: Invited, content: bytes) -> None:
        """Note what a device found out. Raises ValueError if that is not valid."""
        report = Report.from_json(content.decode("utf-8"))
        if self.offer is None or report.run != self.offer.run:
            raise ValueError("about another run")
        self.reports[device.name] = report
        if report.failed:
            self.refused[device.name] = "; ".join(report.failed)
        else:
            self.refused.pop(device.name, None)


def front_app(board: Board) -> Starlette:
    """The front as an ASGI app. Raises UserError if the fleet's certificate cannot be read."""
    try:
        trust = ssl.create_default_context(cafile=board.folder.ca)
    except OSError as error:
        raise UserError(f"{board.folder.ca}: cannot be read as a certificate ({error.strerror})") from None
    client = httpx.AsyncClient(verify=trust, timeout=TIMEOUT_S, trust_env=False)

    async def offer(request: Request) -> Response:
        device = await run_in_threadpool(board.caller, request)
        if device is None:
            return _unknown()
        if board.offer is None:
            return PlainTextResponse("no run is served now", 503)
        if not board.fits_versions(request, device):
            return PlainTextResponse(board.offer.versions, 409)
        return Response(board.offer.to_json(), media_type="application/json")

    async def report(request: Request) -> Response:
        device = await run_in_threadpool(board.caller, request)
        if device is None:
            return _unknown()
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                return _too_large()
        try:
            board.take(device, content)
        except ValueError as error:
            return PlainTextResponse(f"not a report ({error})", 400)
        return PlainTextResponse("")

    async def call(request: Request) -> Response:
        if await run_in_threadpool(board.caller, request) is None:
            return _unknown()
        headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in _OF_ONE_HOP]
        url = f"https://{LOOPBACK}:{board.upstream}{request.url.path}"
        try:
            declared(request)
            content = await own_answers(request) if request.url.path.endswith(f"/{ANSWERS}") else body(request)
            if board.upstream is None:
                raise httpx.ConnectError("no SuperLink")
            passed = client.build_request("POST", url, headers=headers, content=content)
            answer = await client.send(passed, stream=True)
        except TooLargeError:
            return _too_large()
        except NotItsOwnError:
            return PlainTextResponse("not an answer of the device that sends it", 403)
        except httpx.TransportError:
            return PlainTextResponse("the server is not ready", 503)
        kept = {name: value for name, value in answer.headers.items() if name not in _OF_ONE_HOP}
        return StreamingResponse(_body(answer), answer.status_code, kept)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    routes = [Route(f"/v1/fleet/{name}", call, methods=["POST"]) for name in CALLS]
    own = [Route(PATH, offer, methods=["GET"]), Route(REPORT_PATH, report, methods=["POST"])]
    return Starlette(routes=[*own, *routes], lifespan=lifespan)


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


def _too_large() -> Response:
    """The connection is closed, because who calls might send without end."""
    return PlainTextResponse("too large", 413, {"connection": "close"})


def _unknown() -> Response:
    return PlainTextResponse("the key is not on the roster", 401)


@contextlib.contextmanager
def front(board: Board, address: str, port: int) -> Iterator[None]:
    """Serve the front in a thread of its own. Raises UserError if the address cannot be used."""
    listening = listen(address, port, "is another `hfedmoe serve` running?")
    with served(
        front_app(board),
        listening,
        f"{board.folder.path}: the front did not start; its certificates may be damaged",
        ssl_certfile=board.folder.certificate,
        ssl_keyfile=str(board.folder.key),
        timeout_graceful_shutdown=5,
    ):
        yield
