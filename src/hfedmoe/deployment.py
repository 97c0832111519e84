"""The two apps for Flower's own carriers: `flwr run` with a SuperLink and SuperNodes.

The app folder that Flower ships (examples/flower) only imports `server` and `client` from here, so every device
runs the hfedmoe that is installed on it. The run's configuration travels as one text, in the TOML of a config file:

    flwr run examples/flower CONNECTION --run-config run.toml        # run.toml: config = "..."  out = "runs/federated"

A SuperNode says which client it is, and may keep data of its own and say what it has room for:

    flower-supernode ... --node-config "partition-id=0 data='/data/hospital.csv' budget='4GiB'"

Code that is shipped with a checkpoint runs on a node only if that says `trust-remote-code=true`, too.
"""

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig, config_from_text
from hfedmoe.config.budgets import AUTO, Budget, check_budget
from hfedmoe.data.partition import partition
from hfedmoe.device.budgets import experts_of, memory_of, planner_of
from hfedmoe.device.limits import hold_process_to
from hfedmoe.errors import UserError
from hfedmoe.events import Silent, Watcher
from hfedmoe.files.cache import cache_folder
from hfedmoe.models.loaded import device_of
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.report.live import Live
from hfedmoe.runs import RunFolder
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server, server_app

PLANNED = "planned"
TRUST = "trust-remote-code"
"""What a node says if it lets the server's configuration turn `model.trust_remote_code` on."""


def config_of(context: Context) -> RunConfig:
    """The run's configuration from Flower's run config. Raises UserError if it is missing or wrong."""
    text = context.run_config.get("config")
    if not isinstance(text, str):
        raise UserError('the run config has no text "config"; pass it with --run-config FILE.toml')
    return config_from_text(text, "the run config's config")


def _number(context: Context, config: RunConfig) -> int:
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < config.clients.count:
        raise UserError(
            f"this node has no partition-id in 0..{config.clients.count - 1}; start it with "
            '--node-config "partition-id=0"'
        )
    return number


@functools.lru_cache(maxsize=1)
def _prepared(document: str) -> Prepared:
    """The model and data of a configuration: one per process, as a device has one model; its experts stay on disk."""
    return prepare(RunConfig.model_validate_json(document), Silent(), carve=True)


def _is_simulated() -> bool:
    """Whether this is a worker of Flower's simulation engine, both sides of which one user starts.

    Not told by the node's configuration: what the engine writes there, many write for real nodes as well.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _device(context: Context) -> Device:
    config = config_of(context)
    number = _number(context, config)
    if config.model.trust_remote_code and not _is_simulated() and context.node_config.get(TRUST) is not True:
        raise UserError(
            f"the run wants to execute code that is shipped with {config.model.name} (model.trust_remote_code); only "
            f'this node can allow that: start it with --node-config "... {TRUST}=true"'
        )
    own: Any = context.node_config.get("data")
    if own is not None:
        data = config.data.model_copy(update={"source": str(own), "clients": None, "test": None})
        config = config.model_copy(update={"data": data})
    budget = _budget(context, config, number)
    place = device_of(config.model.device)
    memory = memory_of(budget, str(place)) if config.method.residency == "budget" else None
    # Also where there is no limit: Flower may have had this process serve a client with one before.
    hold_process_to(memory if place.type == "cpu" and budget != AUTO else None)
    prepared = _prepared(config.model_dump_json())
    if memory is not None and prepared.model.masked:
        raise UserError(
            f"clients.budgets: {budget!r}: {config.model.name} cannot be read expert by expert, so a device holds all "
            "of it; use a folder or hub id with a safetensors checkpoint (`hfedmoe upcycle` writes one), or give the "
            "budget in experts"
        )
    examples = prepared.task.train
    if own is None:
        parts = partition(prepared.task, config.partition, config.clients.count, config.seed)
        examples = [examples[i] for i in parts[number]]
    return Device(
        number,
        f"client {number}",
        prepared.model,
        prepared.encoder,
        examples,
        config,
        budget_experts=_experts(context, config, budget, prepared, str(place)),
        # By run and number: another federation's client of that number may be at work on this machine, and a SuperNode
        # that is started again may be given another node id.
        notes=cache_folder() / "devices" / f"{context.run_id}-client-{number}.json",
    )


def _budget(context: Context, config: RunConfig, number: int) -> Budget:
    """What the node says that it has, or else what the configuration gives its number. Raises UserError."""
    own = context.node_config.get("budget")
    if own is None:
        budgets = config.clients.budgets
        return budgets[number % len(budgets)]
    try:
        check_budget(own)
    except ValueError as error:
        raise UserError(f"this node's budget: {error}") from None
    return own


def _experts(context: Context, config: RunConfig, budget: Budget, prepared: Prepared, device: str) -> int | None:
    """The node's budget in experts; planned once, as every message may come to a new process. None: unlimited."""
    if config.method.residency == "all":
        return None
    asked = hashlib.sha256(f"{budget!r} {config.model_dump_json()}".encode()).hexdigest()
    kept = context.state.config_records.get(PLANNED)
    if kept is not None and kept["asked"] == asked:
        return int(kept["experts"])  # type: ignore[arg-type]
    model = prepared.model
    top_k = [layer.top_k for layer in model.layers]
    experts = experts_of(budget, model.num_experts, top_k, planner_of(config), device)
    context.state[PLANNED] = ConfigRecord({"asked": asked, "experts": experts})
    return experts


def _server(context: Context) -> Server:
    config = with_absolute_paths(config_of(context))
    # A server app's output is a log, not a screen: plain lines, or nothing if Flower closed the stream.
    watcher: Watcher = Live()
    out = context.run_config.get("out")
    prepared = prepare(config, watcher)
    for text in prepared.warnings:
        watcher.warning(text)
    folder = RunFolder.create(Path(str(out)), prepared.settled) if out else None
    return server_for(prepared, Keeper(folder), watcher)


client = client_app(_device)
server = server_app(_server)
