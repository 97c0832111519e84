"""The two apps for Flower's own carriers: `flwr run` with a SuperLink and SuperNodes.

The app folder that Flower ships (examples/flower) only imports `server` and `client` from here, so every device
runs the hfedmoe that is installed on it. The run's configuration travels as one text, in the TOML of a config file:

    flwr run examples/flower CONNECTION --run-config run.toml        # run.toml: config = "..."  out = "runs/federated"

A SuperNode says which client it is, and may keep data of its own:

    flower-supernode ... --node-config "partition-id=0 data='/data/hospital.csv'"
"""

import functools
from pathlib import Path
from typing import Any

from flwr.app import Context

from hfedmoe.config import RunConfig, config_from_text
from hfedmoe.data.partition import partition
from hfedmoe.errors import UserError
from hfedmoe.experiment import Prepared, prepare
from hfedmoe.federation.client import Device, client_app
from hfedmoe.federation.records import Keeper
from hfedmoe.federation.server import Server, server_app
from hfedmoe.moe.payload import global_tensors
from hfedmoe.report.live import Live, Silent, Watcher
from hfedmoe.runs import RunFolder


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
    """The model and data of a configuration: one per process, as a device has one model."""
    return prepare(RunConfig.model_validate_json(document), Silent())


def _device(context: Context) -> Device:
    config = config_of(context)
    number = _number(context, config)
    own: Any = context.node_config.get("data")
    if own is not None:
        data = config.data.model_copy(update={"source": str(own), "clients": None, "test": None})
        config = config.model_copy(update={"data": data})
    prepared = _prepared(config.model_dump_json())
    examples = prepared.task.train
    if own is None:
        parts = partition(prepared.task, config.partition, config.clients.count, config.seed)
        examples = [examples[i] for i in parts[number]]
    return Device(number, f"client {number}", prepared.model, prepared.encoder, examples, config)


def _server(context: Context) -> Server:
    config = config_of(context)
    # A server app's output is a log, not a screen: plain lines, or nothing if Flower closed the stream.
    watcher: Watcher = Live()
    out = context.run_config.get("out")
    prepared = prepare(config, watcher)
    folder = RunFolder.create(Path(str(out)), config) if out else None
    return Server(
        config=config,
        tensors=global_tensors(prepared.model),
        num_experts=prepared.model.num_experts,
        top_k=[layer.top_k for layer in prepared.model.layers],
        evaluate=lambda tensors, kind: prepared.measure(tensors, kind, watcher.evaluating),
        keeper=Keeper(folder),
        watcher=watcher,
        watches=bool(prepared.watch),
    )


client = client_app(_device)
server = server_app(_server)
