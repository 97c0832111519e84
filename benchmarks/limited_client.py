"""One client in a separate process, for measurements under a memory limit: it plans, loads, trains and answers.

It is the client that a SuperNode would start, with a folder instead of the network: for every message the server puts
NAME.request into the folder, and the client puts NAME.reply. The contents are serialised by Flower.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from torch import Tensor

from hfedmoe.client.app import client_app
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig, load_config
from hfedmoe.device.capacity import budgets_in_experts
from hfedmoe.device.limits import LimitedRun, run_limited
from hfedmoe.device.peak import peak_process_bytes
from hfedmoe.events import Silent
from hfedmoe.models.carved import checkpoint_folder, open_model
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.payload import global_tensors, pack
from hfedmoe.prepare import prepare
from hfedmoe.wire import checks
from hfedmoe.wire.inprocess import InProcessGrid
from hfedmoe.wire.messages import DESCRIBE, PLAN, TRAIN, Update, describe_request, facts_of, record, train_request

PATIENCE_S = 900.0
STOP = "stop"
"""A file that tells the client that there are no more messages."""


def put(file: Path, content: RecordDict) -> None:
    """Write a message's content atomically."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(recorddict_to_proto(content).SerializeToString())
    partial.rename(file)


def take(file: Path) -> RecordDict:
    """Wait for a message's content. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > deadline or (file.parent / STOP).exists():
            raise TimeoutError(f"{file.name} did not come")
        time.sleep(0.05)
    return recorddict_from_proto(Proto.FromString(file.read_bytes()))


def client(folder: Path, carve: bool) -> None:
    """Answer a description, a plan and a training request; print what each took as JSON."""
    started = time.perf_counter()
    config = load_config(folder / "client.toml")
    prepared = prepare(config, Silent(), carve=carve)
    model = prepared.model
    top_k = [layer.top_k for layer in model.layers]
    experts = sum(model.num_experts)
    if carve:
        (experts,) = budgets_in_experts(config, model.num_experts, top_k, str(model.device))
    device = Device(
        0, "limited", model, prepared.encoder, prepared.task.train, config, prepared.initial, budget_experts=experts
    )
    took = {"load": {"seconds": time.perf_counter() - started, "peak_bytes": peak_process_bytes()}}
    grid = InProcessGrid(client_app(lambda *_: device), 1)
    for kind in (DESCRIBE, PLAN, TRAIN):
        request = grid.create_message(take(folder / f"{kind}.request"), kind, 1, "")
        began = time.perf_counter()
        (reply,) = grid.send_and_receive([request])
        if reply.has_error():
            raise RuntimeError(f"{kind}: {reply.error.reason}")
        put(folder / f"{kind}.reply", reply.content)
        del request, reply
        took[kind] = {"seconds": time.perf_counter() - began, "peak_bytes": peak_process_bytes()}
    held = {} if model.store is None else {"experts": len(model.store), "bytes": model.store.nbytes}
    print(json.dumps({"took": took, "held": held}))


@dataclass
class Round:
    """The results of one round with one client."""

    run: LimitedRun
    """How its process ended."""
    update: Update | None = None
    """Checked as on a server; None if the process ended before it could answer."""
    resident: list[Tensor] | None = None
    took: dict[str, Any] | None = None
    """For every stage, its seconds and the peak bytes of the process at its end."""
    held: dict[str, int] | None = None


def one_round(folder: Path, limit_bytes: int, how: str = "auto", whole: bool = False) -> Round:
    """Play the server for a client that runs under a memory limit. Its configuration is `folder/client.toml`.

    Args:
        how: see `device.limits.run_limited`.
        whole: the client loads the whole model, as it would without carving.

    Raises:
        InvalidReplyError: an answer is invalid.
        TroubleError: the client says that it ran out of memory.
    """
    for old in (*folder.glob("*.request"), *folder.glob("*.reply"), *folder.glob(STOP)):
        old.unlink()
    command = [sys.executable, "-m", "benchmarks.limited_client", str(folder), *(["--whole"] if whole else [])]
    done: list[LimitedRun] = []
    process = threading.Thread(
        target=lambda: done.append(run_limited(command, limit_bytes, timeout_s=PATIENCE_S, how=how))
    )
    process.start()

    def ask(kind: str, content: RecordDict) -> RecordDict | None:
        put(folder / f"{kind}.request", content)
        while process.is_alive() and not (folder / f"{kind}.reply").exists():
            time.sleep(0.05)
        return take(folder / f"{kind}.reply") if (folder / f"{kind}.reply").exists() else None

    try:
        described = ask(DESCRIBE, describe_request(""))
        planned = None if described is None else ask(PLAN, record({"round": 1}))
        if planned is None:
            process.join()
            return Round(done[0])
        config = load_config(folder / "client.toml")
        tensors, num_experts, top_k = _state(config)
        checks.trouble(_message(planned))
        budget = sum(num_experts)
        resident = checks.plan(_message(planned), checks.Room(num_experts, top_k, budget)).resident
        assert resident is not None
        answer = ask(TRAIN, train_request(1, resident, pack(tensors, resident)))
    finally:
        (folder / STOP).touch()
        process.join()
    if answer is None:
        return Round(done[0], None, resident)
    checks.trouble(_message(answer))
    update = checks.update(_message(answer), resident, tensors, checks.Asked.of(config, top_k))
    report = json.loads(done[0].stdout.strip().splitlines()[-1])
    return Round(done[0], update, resident, report["took"], report["held"])


def _state(config: RunConfig) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """The server's state: the trained tensors of all experts. It reads no base weights of experts."""
    folder = checkpoint_folder(config.model)
    if folder is None:
        raise ValueError(f"{config.model.name} has no checkpoint to carve")
    loaded = open_model(config.model, folder)
    model = wrap(loaded.model, config, loaded.store, masked=False)
    for state in model.states:
        if state.begin is not None:
            state.trained = state.begin(torch.arange(state.layer.num_experts))
    return global_tensors(model), model.num_experts, [layer.top_k for layer in model.layers]


def _message(content: RecordDict) -> Any:
    grid = InProcessGrid(client_app(lambda *_: None), 1)  # type: ignore[arg-type]
    message = grid.create_message(content, TRAIN, 1, "")
    facts_of(message)
    return message


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--whole", action="store_true", help="load the whole model instead of carving it")
    given = arguments.parse_args()
    client(given.folder, carve=not given.whole)
