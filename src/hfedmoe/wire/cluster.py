"""A connection to Ray: started here for one run, or a cluster that is running somewhere.

The workers are those of Flower's simulation engine (`ClientAppActor`). Its driver, `flwr.simulation.run_simulation`, is
not used: it is deprecated, has no deadlines, goes on with dead workers, and keeps what clients remember to itself, so
that a run could not be resumed.
"""

import importlib.util
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hfedmoe.config import CarrierConfig
from hfedmoe.errors import UserError

REACH_S = 5.0
"""Seconds for a cluster to accept a connection; Ray itself would try for half a minute and then end the process."""


class Cluster:
    """Ray with room for `at_once` workers. Use `connected` to get one."""

    def __init__(self, settings: CarrierConfig, at_once: int) -> None:
        self.at_once = at_once
        self._resources = {"num_cpus": settings.cpus_per_client, "num_gpus": settings.gpus_per_client}

    def worker(self) -> Any:
        """A new worker of Flower's simulation engine; it starts as soon as there is room for it."""
        from flwr.simulation.ray_transport.ray_actor import ClientAppActor

        return ClientAppActor.options(**self._resources).remote()  # type: ignore[attr-defined]

    def beside(self, kind: type, *arguments: Any) -> Any:
        """An object of a class of ours in a process of its own, which needs no room to speak of."""
        import ray

        return ray.remote(kind).options(num_cpus=0).remote(*arguments)


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
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # without GPUs of its own a worker sees none
    import ray

    wanted = settings.clients_at_once or max(1, int(cores / settings.cpus_per_client))
    here = {"num_cpus": math.ceil(min(wanted, clients) * settings.cpus_per_client), "include_dashboard": False}
    try:
        ray.init(
            address=settings.address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **(here if settings.address is None else {}),
        )
    except (Exception, SystemExit) as error:  # Ray ends the process where a cluster's port is not one of Ray
        at = "on this machine" if settings.address is None else f"carrier.address = {settings.address}"
        raise UserError(f"{at}: Ray cannot be used ({_line(error)})") from None
    try:
        yield Cluster(settings, _room(settings, clients))
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise UserError if nothing listens at a cluster's address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or int(port) > 65535:
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
        free = node["Resources"] if node["Alive"] else {}
        fit = free.get("CPU", 0.0) / settings.cpus_per_client
        if settings.gpus_per_client:
            fit = min(fit, free.get("GPU", 0.0) / settings.gpus_per_client)
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
