"""A line between two machines that can be slow, far, cut or gone: a proxy for TCP on loopback."""

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator

CHUNK = 1 << 14


class Line:
    """Carries bytes from a port of its own to the server's."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server((server[0], 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_s = 0.0
        """Seconds in each direction."""
        self.up_bytes_s: float | None = None
        """Most bytes per second towards the server; None: no limit."""
        self._open = threading.Event()
        self._open.set()
        self.up = self.down = 0
        """Bytes carried."""
        self._free_at = 0.0
        self._ends: set[socket.socket] = set()
        """Both ends of every connection."""
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """During the block nothing passes, and nobody is told."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def reset(self) -> None:
        """End every connection at once, as a router does that was started again."""
        for end in list(self._ends):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
                end.close()

    def _accept(self) -> None:
        while True:
            device, _ = self._listener.accept()
            self._open.wait()
            with contextlib.suppress(OSError):
                server = socket.create_connection(self._server)
                self._ends |= {device, server}
                for one, other, up in ((device, server, True), (server, device, False)):
                    threading.Thread(target=self._pump, args=(one, other, up), daemon=True).start()
                continue
            device.close()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        on_its_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
        threading.Thread(target=self._deliver, args=(on_its_way, target, up), daemon=True).start()
        data = b"x"
        with contextlib.suppress(OSError):
            while data:
                data = source.recv(CHUNK)
                if up and self.up_bytes_s is not None:
                    self._free_at = max(time.monotonic(), self._free_at) + len(data) / self.up_bytes_s
                    time.sleep(max(0.0, self._free_at - time.monotonic()))
                on_its_way.put((time.monotonic() + self.delay_s, data))
        if data:
            on_its_way.put((0.0, b""))

    def _deliver(self, on_its_way: "queue.Queue[tuple[float, bytes]]", target: socket.socket, up: bool) -> None:
        """Pass on what is due, in its order; many chunks may be on their way at a time."""
        with contextlib.suppress(OSError):
            while True:
                due, data = on_its_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                self._open.wait()
                if not data:
                    break
                target.sendall(data)
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
        self._ends.discard(target)
