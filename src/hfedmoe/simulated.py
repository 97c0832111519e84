"""Simulated clients: their rows, their devices, and the app that answers for all of them, here or in a worker."""

import contextlib
import functools
import socket
from dataclasses import dataclass, replace

import torch
from flwr.clientapp import ClientApp

import hfedmoe
from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.data.kept import keep_back
from hfedmoe.data.partition import partition
from hfedmoe.data.sites import site_names
from hfedmoe.device.predicted import peaks_of
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.gains import Sites
from hfedmoe.method.methods import METHODS
from hfedmoe.prepare import Prepared, prepare
from hfedmoe.runs.identity import IN_WORKERS, SIMULATED, Identity, identity_of
from hfedmoe.wire.worker import OnStep


def split(prepared: Prepared, keeping: bool) -> Sites:
    """Who trains on which rows; with `keeping`, clients keep some of theirs back."""
    config, task = prepared.config, prepared.task
    parts = partition(task, config.partition, config.clients.count, config.seed)
    names = site_names(task, config.data, len(parts))
    if not keeping:
        return Sites(names, parts, [[] for _ in parts])
    return Sites(names, *keep_back(task, parts, config.evaluation, config.seed))


def identity(prepared: Prepared, sites: Sites | None = None) -> Identity:
    """The identity of a run with simulated clients; `sites`: None where it does not matter what they keep back."""
    own = 0 if sites is None else sum(map(len, sites.kept))
    carrier = IN_WORKERS if prepared.config.carrier.kind == "ray" else SIMULATED
    return identity_of(prepared.config, prepared.task, prepared.watch, carrier, own)


def devices_of(
    prepared: Prepared, parts: list[list[int]], names: list[str] | None, on_step: OnStep
) -> tuple[Prepared, list[Device]]:
    """All clients, and the federation as they see it: a method that pools the rows of all has one client.

    They share one model in memory; a client's sub-model is a mask over it.

    Args:
        parts: the rows of every client, as indices into `prepared.task.train`.
        names: of the clients; None: by number.
    """
    if METHODS[prepared.config.method.name].pooled:
        (prepared, parts), names = _pooled(prepared, parts), None
    names = names or [f"client {number}" for number in range(len(parts))]
    return prepared, [
        Device(
            number=number,
            name=names[number],
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


def _pooled(prepared: Prepared, parts: list[list[int]]) -> tuple[Prepared, list[list[int]]]:
    """One client with the rows of all, without limits, that takes as many steps in a round as they would together."""
    config = prepared.config
    asked = config.federation.clients_per_round or config.clients.count
    changes = {
        "clients": config.clients.model_copy(update={"count": 1, "budgets": ["100%"], "deadlines_s": None}),
        "federation": config.federation.model_copy(update={"clients_per_round": None, "min_clients": 1}),
        "train": config.train.model_copy(update={"steps": config.train.steps * asked}),
        "data": config.data.model_copy(update={"clients": None}),
    }
    one = replace(prepared, config=config.model_copy(update=changes), budgets=None)
    return one, [sorted(row for part in parts for row in part)]


def let_measure(prepared: Prepared, devices: list[Device], sites: Sites) -> None:
    """Let every device measure itself on the rows that it keeps back."""
    for device, rows in zip(devices, sites.kept, strict=True):
        device.kept = [prepared.task.train[row] for row in rows]
        device.judge = prepared.measure_now


def predict_peaks(prepared: Prepared, devices: list[Device]) -> None:
    """Let every device say the peak that `hfedmoe plan` predicts for what it holds. Raises UserError if it cannot."""
    peaks = peaks_of(prepared.config, str(prepared.model.device))
    for device in devices:
        device.forecast = functools.partial(peaks, device.number)


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
    """With the rows that clients keep back."""
    version: str = hfedmoe.__version__

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
        sites = split(prepared, keeping=self.identity.own_rows > 0)
        if identity(prepared, sites) != self.identity:
            raise UserError(
                f"{where} has other rows or another base model than the server; give every machine of the cluster the "
                "same files under the same paths"
            )
        _, devices = devices_of(prepared, sites.trained, sites.names, on_step)
        if self.config.evaluation.clients_measure:
            let_measure(prepared, devices, sites)
        with contextlib.suppress(UserError):  # the server says it
            predict_peaks(prepared, devices)
        return app_of(devices)
