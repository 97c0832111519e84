"""A connection to Ray: started on this machine for one run, or a cluster that is running somewhere.

The driver of Flower's own simulations (`flwr.simulation.run_simulation`) is not used. It is deprecated, gives further
clients to workers that are dead, does not tell steps, and keeps what clients remember to itself, so a run could not be
resumed.
"""

import importlib.util
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hfedmoe.config import CarrierConfig
from hfedmoe.errors import UserError
from hfedmoe.wire.worker import Worker

if TYPE_CHECKING:
    from ray.util.queue import Queue

REACH_S = 5.0
"""Seconds for a cluster to accept a connection. Ray itself tries for half a minute and then ends the process."""


class Cluster:
    """Ray with room for `at_once` workers. Use `connected` to get one."""

    def __init__(self, settings: CarrierConfig, at_once: int) -> None:
        self.settings = settings
        self.at_once = at_once

    def queue(self) -> "Queue":
        """Where workers tell the server what happens; a process of its own, which needs no CPU to speak of."""
        from ray.util.queue import Queue

        return Queue(actor_options={"num_cpus": 0})

    def worker(self, said: "Queue") -> Any:
        """Ray's handle of a new worker; it starts as soon as there is room for it."""
        import ray

        room = {"num_cpus": self.settings.cpus_per_client, "num_gpus": self.settings.gpus_per_client}
        return ray.remote(Worker).options(**room).remote(said)


@contextmanager
def connected(settings: CarrierConfig, clients: int, cores: int) -> Iterator[Cluster]:
    """Ray during the block.

    Args:
        clients: of a round: there is no use for more workers.
        cores: of this machine, where Ray is started here.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or it has no room for the workers.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('carrier.kind = "ray" needs Ray: pip install "hfedmoe[ray]"')
    if settings.address is not None:
        _reach(settings.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    # Ray's future default. A worker without a GPU of its own works on CPUs because its app is told so.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    with ExitStack() as stack:
        options: dict[str, Any] = {"address": settings.address}
        if settings.address is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hfedmoe-ray-", ignore_cleanup_errors=True))
            wanted = min(settings.clients_at_once or max(1, int(cores / settings.cpus_per_client)), clients)
            options = {
                "address": "local",
                "num_cpus": math.ceil(wanted * settings.cpus_per_client),
                "include_dashboard": False,
                "_temp_dir": folder,  # its logs and spilled objects go when the run ends
            }
        stack.callback(_handle_again, signal.getsignal(signal.SIGTERM))
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except (Exception, SystemExit) as error:  # Ray ends the process where the port is not one of Ray
            at = "on this machine" if settings.address is None else f"carrier.address = {settings.address}"
            raise UserError(f"{at}: Ray cannot be used ({_line(error)})") from None
        stack.callback(ray.shutdown)
        yield Cluster(settings, _room(settings, clients))


def _handle_again(handler: Any) -> None:
    """Put the handler of SIGTERM back, which Ray replaces for good; only a main thread may, and only there Ray does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Raise UserError if nothing listens at a cluster's address."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise UserError(f"carrier.address = {address}: expected HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise UserError(
            f"carrier.address = {address}: no Ray cluster answers there ({error.strerror or error}); start one with "
            "`ray start --head`, or leave the address out to start Ray on this machine"
        ) from None


def _room(settings: CarrierConfig, clients: int) -> int:
    """Workers to start. Raises UserError if there is no room for any, or not for as many as were asked for."""
    import ray

    room = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        fit = has.get("CPU", 0.0) / settings.cpus_per_client
        if settings.gpus_per_client:
            fit = min(fit, has.get("GPU", 0.0) / settings.gpus_per_client)
        room += int(fit + 1e-9)
    wanted = min(settings.clients_at_once or max(room, 1), clients)
    if wanted > room:
        raise UserError(
            f"Ray has room for {room} workers with {settings.cpus_per_client:g} CPUs and {settings.gpus_per_client:g} "
            f"GPUs each, not for {wanted}; lower carrier.clients_at_once, cpus_per_client or gpus_per_client"
        )
    return wanted


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines and not isinstance(error, SystemExit) else "no Ray cluster answers"
