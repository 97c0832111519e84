"""Simulated clients: their rows, their devices, and the app that answers for all of them, here or in a worker."""

import socket
from dataclasses import dataclass, replace

import torch
from flwr.clientapp import ClientApp

import hfedmoe
from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.data.partition import partition
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.method.methods import METHODS
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.runs.identity import IN_WORKERS, SIMULATED, Identity, identity_of
from hfedmoe.wire.worker import OnStep


def split(prepared: Prepared) -> list[list[int]]:
    """The rows of every client, as indices into `prepared.task.train`."""
    config = prepared.config
    return partition(prepared.task, config.partition, config.clients.count, config.seed)


def identity(prepared: Prepared) -> Identity:
    """The identity of a run with simulated clients."""
    carrier = IN_WORKERS if prepared.config.carrier.kind == "ray" else SIMULATED
    return identity_of(prepared.config, prepared.task, prepared.watch, carrier)


def as_trained(prepared: Prepared, parts: list[list[int]]) -> tuple[Prepared, list[list[int]]]:
    """The federation as the method sees it: a method that pools all rows has one client.

    It has no limits, and takes as many steps in a round as all clients would together.
    """
    config = prepared.config
    if not METHODS[config.method.name].pooled:
        return prepared, parts
    asked = config.federation.clients_per_round or config.clients.count
    changes = {
        "clients": config.clients.model_copy(update={"count": 1, "budgets": ["100%"], "deadlines_s": None}),
        "federation": config.federation.model_copy(update={"clients_per_round": None, "min_clients": 1}),
        "train": config.train.model_copy(update={"steps": config.train.steps * asked}),
        "data": config.data.model_copy(update={"clients": None}),
    }
    one = replace(prepared, config=config.model_copy(update=changes), budgets=None)
    return one, [sorted(row for part in parts for row in part)]


def devices_of(prepared: Prepared, parts: list[list[int]], on_step: OnStep) -> list[Device]:
    """All clients. They share one model in memory; a client's sub-model is a mask over it."""
    return [
        Device(
            number=number,
            name=f"client {number}",
            model=prepared.model,
            encoder=prepared.encoder,
            examples=[prepared.task.train[i] for i in indices],
            config=prepared.config,
            initial=prepared.initial,
            simulated=True,
            on_step=on_step,
            budget_experts=None if prepared.budgets is None else prepared.budgets[number],
        )
        for number, indices in enumerate(parts)
    ]


def app_of(devices: list[Device]) -> ClientApp:
    """The app of all clients."""
    return client_app(lambda _, context: devices[int(context.node_config["partition-id"])])


@dataclass(frozen=True)
class WorkerApp:
    """Makes the app of all clients in a worker, which loads the model and the rows itself.

    It does not plan budgets anew, since its machine may be another one, and refuses other rows or another model.
    """

    config: RunConfig
    """As the server prepared it, with paths that hold on the worker's machine."""
    budgets: list[int] | None
    """Of `Prepared`."""
    identity: Identity
    version: str = hfedmoe.__version__

    @classmethod
    def of(cls, prepared: Prepared) -> "WorkerApp":
        """For a prepared run, before `as_trained`."""
        return cls(prepared.config, prepared.budgets, identity(prepared))

    def __call__(self, on_step: OnStep) -> ClientApp:
        """The app. Raises UserError if this machine has another hfedmoe, other rows or another model, or none."""
        where = f"the machine {socket.gethostname()}"
        if self.version != hfedmoe.__version__:
            raise UserError(f"{where} has hfedmoe {hfedmoe.__version__}, the server {self.version}; install the same")
        carrier = self.config.carrier
        torch.set_num_threads(max(1, int(carrier.cpus_per_client)))
        config = self.config
        if not carrier.gpus_per_client:  # it may see the GPUs of others
            config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
        prepared = prepare(config, Silent(), budgets=self.budgets)
        if identity(prepared) != self.identity:
            raise UserError(
                f"{where} has other rows or another base model than the server; give every machine of the cluster the "
                "same files under the same paths"
            )
        devices = devices_of(*as_trained(prepared, split(prepared)), on_step)
        return app_of(devices)
