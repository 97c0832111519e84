"""A web application that is served in a thread while a block runs."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfedmoe.errors import UserError

START_S = 15.0


def listen(host: str, port: int, then: str) -> socket.socket:
    """A socket that listens at an address of this machine.

    Args:
        host: an IP address, or a name of this machine.
        port: 0 takes a free one.
        then: the way out, for the error.

    Raises:
        UserError: the address or port cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # Negative numbers are of the look-up of names, and not of the system.
        reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else "no such address here"
        raise UserError(f"{host}, port {port}: cannot listen there ({reason}); {then}") from None


@contextmanager
def served(app: Any, listening: socket.socket, why_not: str, **settings: Any) -> Iterator[None]:
    """Serve an ASGI application with uvicorn in a thread of its own; the socket is closed after the block.

    Args:
        why_not: what to say if it does not start.
        settings: of `uvicorn.Config`.

    Raises:
        UserError: it does not start.
    """
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="web", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise UserError(why_not)
            time.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
