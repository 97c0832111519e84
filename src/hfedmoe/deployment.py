"""The ServerApp and the ClientApp for Flower's own network: `flwr run` with a SuperLink and SuperNodes.

The app folder that Flower ships (examples/flower) only imports `server` and `client` from here, so every device
runs the hfedmoe that is installed on it. The run's configuration is sent as one text, the TOML of a config file:

    flwr run examples/flower CONNECTION --run-config run.toml        # run.toml: config = "..."  out = "runs/federated"

The node config of a SuperNode says which client it is, and may name its own data and budget:

    flower-supernode ... --node-config "partition-id=0 data='/data/hospital.csv' budget='4GiB'"

Code that is shipped with a checkpoint runs on a node only if its node config also has `trust-remote-code=true`. More
keys limit what a server may ask of the node (`client.policy`).
"""

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message
from pydantic import ValidationError

from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.client.lasting import TASK
from hfedmoe.client.place import Place
from hfedmoe.client.policy import Policy, PolicyError
from hfedmoe.config import DataConfig, RunConfig, config_from_text
from hfedmoe.config.budgets import AUTO, Budget, check_budget
from hfedmoe.data.decoding import DEVICE, PLAIN, Form
from hfedmoe.data.kept import kept_by
from hfedmoe.data.partition import partition
from hfedmoe.data.sources import is_path
from hfedmoe.data.terms import Terms, task_key
from hfedmoe.device.beside import left_of
from hfedmoe.device.capacity import experts_of, memory_of, planner_of
from hfedmoe.device.limits import hold_process_to
from hfedmoe.errors import UserError
from hfedmoe.events import Silent, Watcher
from hfedmoe.files.cache import cache_folder, data_folder
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Method
from hfedmoe.models.digest import base_digest, tokenizer_digest
from hfedmoe.models.loaded import device_of
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.report.live import Live
from hfedmoe.report.tracking.tracking import tracked
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import DEPLOYED, identity_of, write_identity
from hfedmoe.runs.paths import with_absolute_paths
from hfedmoe.runs.refusals import require_trackers
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.server import Server, server_app
from hfedmoe.wire.messages import DESCRIBE
from hfedmoe.wire.requests import check_settings, task_of
from hfedmoe.wire.same import Digests
from hfedmoe.wire.trouble import OTHER_TASK

PLACE = "place"
TRUST = "trust-remote-code"
"""Key of the node config that lets the run's configuration turn on `model.trust_remote_code`."""
SHARED = "shared-data"
"""Key of the node config that lets the device read the file that the run's configuration names."""


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
def _prepared(document: str, own: str | None, form: Form, state: tuple[int, int] | None, terms: str) -> Prepared:
    """The model and data of a configuration: one per process, as a device has one model; its experts stay on disk.

    Args:
        own: the device's own file; None: its part of the run's data.
        form: how that file is written.
        state: its size and time of change: a file that was corrected is read again.
    """
    config = RunConfig.model_validate_json(document)
    return prepare(config, Silent(), carve=True, own=own, terms=Terms.from_json(terms), form=form)


def _own(context: Context) -> tuple[str | None, Form, tuple[int, int] | None]:
    """The device's own file, how it is written, and its size and time of change. Raises UserError."""
    settings = context.node_config
    if settings.get("data") is None:
        return None, PLAIN, None
    own, said = str(settings["data"]), {key: settings[key] for key in ("encoding", "delimiter") if key in settings}
    try:
        form = Form.of(DataConfig.model_validate(said), DEVICE)
    except ValidationError as error:
        found = error.errors()[0]
        raise UserError(f"this node's {found['loc'][-1]}: {found['msg'].removeprefix('Value error, ')}") from None
    path = Path(own).expanduser()
    return own, form, (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None


def _check_source(config: RunConfig, context: Context) -> None:
    """Raise UserError, without a look at it, if the run names a file that this node has not agreed to read.

    Otherwise a server could ask which files exist, and train on them.
    """
    if _is_simulated() or context.node_config.get(SHARED) is True:
        return
    data = config.data
    named = [source for source in (data.source, data.test, *(data.clients or ())) if source is not None]
    if any(is_path(source) for source in named):
        raise UserError(
            "the run's data are a file; give this node's own file with --node-config \"... data='FILE'\", or let it "
            f'read the file that the run names with "... {SHARED}=true"'
        )


def _is_simulated() -> bool:
    """Whether this is a worker of Flower's simulation engine, where one user starts both server and clients.

    The node config does not show this: real nodes often have the same entries as the engine's.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _config(context: Context) -> RunConfig:
    """The run's configuration, if this device accepts it. Raises UserError or InvalidRequestError."""
    config = config_of(context)
    check_settings(config)
    if config.model.trust_remote_code and not _is_simulated() and context.node_config.get(TRUST) is not True:
        raise UserError(
            f"the run wants to execute code that is shipped with {config.model.name} (model.trust_remote_code); only "
            f'this node can allow that: start it with --node-config "... {TRUST}=true"'
        )
    policy = Policy.of(context.node_config)
    policy.check(config)
    own = policy.model(config.model.name)
    if own != config.model.name:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": own, "revision": None})})
    return config


def open_device(message: Message, context: Context) -> Device:
    """The device of a node, ready to train. Raises UserError or InvalidRequestError."""
    config = _config(context)
    number = _number(context, config)
    budget = _budget(context, config, number)
    place = device_of(config.model.device)
    memory = None if _method(config).ignores_budgets(config.method) else memory_of(budget, str(place))
    # Also without a limit: this process may have served a client with a limit before.
    limited = place.type == "cpu" and budget != AUTO
    hold_process_to(left_of(memory, place.type) if memory is not None and limited else None)
    own, form, state = _own(context)
    if own is None:
        _check_source(config, context)
    policy = Policy.of(context.node_config)
    terms, key = _terms(message, context, config)
    policy.check_task(config.data, terms)
    prepared = _prepared(config.model_dump_json(), own, form, state, terms.to_json())
    context.state[TASK] = ConfigRecord({"text": terms.to_json(), "key": key})
    model = prepared.model
    if memory is not None and model.masked:
        raise UserError(
            f"clients.budgets: {budget!r}: {config.model.name} cannot be read expert by expert, so a device holds all "
            "of it; use a folder or hub id with a safetensors checkpoint (`hfedmoe upcycle` writes one), or give the "
            "budget in experts"
        )
    task = prepared.task
    trained, kept = list(range(len(task.train))), list[int]()
    if own is None:
        trained = partition(task, config.partition, config.clients.count, config.seed)[number]
    if policy.measure:
        trained, kept = kept_by(task, trained, number, config.clients.count, config.evaluation, config.seed)
    policy.check_rows(len(trained))
    device = Device(
        number,
        f"client {number}",
        model,
        prepared.encoder,
        [task.train[row] for row in trained],
        config,
        kept=[task.train[row] for row in kept],
        judge=prepared.measure_now if policy.measure else None,
        initial=prepared.initial,
        base=base_digest(config),
        budget_experts=_experts(context, config, budget, prepared, str(place)),
        notes=_notes(context, number),
        tuned=data_folder() / "tuned" / f"{context.run_id}-client-{number}.safetensors",
        policy=policy,
    )
    known = device.place
    context.state[PLACE] = ConfigRecord(
        {
            "asked": _asked(context, config),
            "num_experts": known.num_experts,
            "top_k": known.top_k,
            "budget": -1 if known.budget_experts is None else known.budget_experts,
            "streams": known.streams,
        }
    )
    return device


def known_place(context: Context) -> Place | None:
    """What is known about the device from an earlier message of this run, so that planning opens no model."""
    kept = context.state.config_records.get(PLACE)
    config = _config(context)
    if kept is None or kept["asked"] != _asked(context, config):
        return None
    number, budget = _number(context, config), int(kept["budget"])  # type: ignore[arg-type]
    return Place(
        number,
        f"client {number}",
        config,
        list(kept["num_experts"]),  # type: ignore[arg-type]
        list(kept["top_k"]),  # type: ignore[arg-type]
        None if budget < 0 else budget,
        bool(kept["streams"]),
        _notes(context, number),
    )


def _asked(context: Context, config: RunConfig) -> str:
    """A digest of the configuration and the node config; a budget planned for another digest is not used."""
    return hashlib.sha256(f"{sorted(context.node_config.items())} {config.model_dump_json()}".encode()).hexdigest()


def _notes(context: Context, number: int) -> Path:
    """The file is named by run and client number: this machine may also work for another federation, and a SuperNode
    may get another node id when it is started again."""
    return cache_folder() / "devices" / f"{context.run_id}-client-{number}.json"


def _terms(message: Message, context: Context, config: RunConfig) -> tuple[Terms, str]:
    """The run's task, from the server's describe request or as it was kept then, and its key.

    Raises:
        PolicyError: the device has read its rows for another task in this run: by a second one the server could ask
            who is among them.
    """
    kept = context.state.config_records.get(TASK)
    if message.metadata.message_type == DESCRIBE:
        terms = task_of(message)
    elif kept is not None:
        terms = Terms.from_json(kept["text"])
    else:
        raise UserError("the server did not send the run's task; it must send describe before plan and train")
    key = task_key(config.data, terms)
    if kept is not None and kept["key"] != key:
        raise PolicyError("the run's columns, labels or settings of rows are not those of before", OTHER_TASK)
    return terms, key


def _budget(context: Context, config: RunConfig, number: int) -> Budget:
    """The budget in the node config, else the one that the configuration has for its number. Raises UserError."""
    own = context.node_config.get("budget")
    if own is None:
        budgets = config.clients.budgets
        return budgets[number % len(budgets)]
    try:
        check_budget(own)
    except ValueError as error:
        raise UserError(f"this node's budget: {error}") from None
    return own


def _method(config: RunConfig) -> Method:
    return METHODS[config.method.name]


def _experts(context: Context, config: RunConfig, budget: Budget, prepared: Prepared, device: str) -> int | None:
    """The node's budget in experts, planned only once: every message may start a new process. None: unlimited."""
    policy, total = Policy.of(context.node_config), sum(prepared.model.num_experts)
    if _method(config).ignores_budgets(config.method):
        policy.experts(total, total)
        if not _method(config).limits_otherwise:
            return None
    kept = context.state.config_records.get(PLACE)
    if kept is not None and kept["asked"] == _asked(context, config):
        return int(kept["budget"])  # type: ignore[arg-type]
    model = prepared.model
    top_k = [layer.top_k for layer in model.layers]
    held = experts_of(budget, model.num_experts, top_k, planner_of(config), device)
    return policy.experts(held, max(top_k) * len(top_k))


@contextlib.contextmanager
def _server(context: Context) -> Iterator[Server]:
    config = with_absolute_paths(config_of(context))
    require_trackers(config.tracking)
    # A server app's output is a log, not a screen: plain lines, or nothing if Flower closed the stream.
    watcher: Watcher = Live()
    out = context.run_config.get("out")
    prepared = prepare(config, watcher)
    folder = RunFolder.create(Path(str(out)), prepared.settled) if out else None
    prepared.announce(watcher, folder)
    if folder is not None:
        write_identity(folder.path, identity_of(prepared.config, prepared.task, prepared.watch, DEPLOYED))
        folder.describe(prepared.about(None))
    keeper = Keeper(folder)
    digests = Digests(base_digest(config), tokenizer_digest(prepared.encoder.tokenizer))
    server = server_for(prepared, keeper, watcher, digests=digests)
    server.asks_sites = True
    with tracked(prepared.settled, folder, watcher, None) as tracking:
        tracking.follow(keeper)
        yield server


client = client_app(open_device, known_place, private=True)
server = server_app(_server)
