"""The process of a device that answers the server: it stays, so that the model is opened once.

    python -m hfedmoe.fleet.worker FOLDER [--check]

`hfedmoe join` starts it, with `--check` if the server only wants to know whether the device fits. It
asks the SuperNode beside it for messages and answers them with the installed client app; the app that the server ships
is never unpacked.
"""

import json
import logging
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from hfedmoe.client.app import client_app, trouble_of
from hfedmoe.client.device import Device
from hfedmoe.config import RunConfig
from hfedmoe.deployment import known_place, open_device
from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.fleet.allowed import Allowed
from hfedmoe.fleet.certificates import LOOPBACK
from hfedmoe.fleet.check import check
from hfedmoe.fleet.device import AGAIN, DOES_NOT_FIT, DeviceFolder
from hfedmoe.fleet.findings import SERVER
from hfedmoe.fleet.invite import read_invitation
from hfedmoe.fleet.memory import RunMemory
from hfedmoe.fleet.superlink import ACQUIRE
from hfedmoe.runs.settings import run_config_toml
from hfedmoe.wire.exchange import Pause
from hfedmoe.wire.messages import (
    DESCRIBE,
    MEASURE,
    PERSONAL,
    PLAN,
    TRAIN,
    TUNE,
    InvalidReplyError,
    facts_of,
    trouble_reply,
)
from hfedmoe.wire.requests import InvalidRequestError, OtherVersionError, check_version, task_of

logger = logging.getLogger("hfedmoe.fleet.worker")

POLL_S, MOST_POLL_S = 0.2, 1.0
"""Seconds between two looks for a message, after one came and after a while without."""
SAY_S = 5.0
"""Seconds between two lines about steps."""


class Worker:
    """A device that answers the messages of its SuperNode.

    Args:
        allowed: what the device's owner allows.
        number: of the client, from the invitation.
        folder: of the device, in which it remembers, and keeps what it trains for itself.
    """

    def __init__(self, allowed: Allowed, number: int, folder: DeviceFolder) -> None:
        self._allowed, self._number, self._folder = allowed, number, folder
        self._run = ""
        self._round = 0
        self._said = 0.0
        self._app = client_app(self._open, known_place, private=True)

    def _open(self, message: Message, context: Context) -> Device:
        device = open_device(message, context)
        steps = device.config.train.steps

        def on_step(_: int, step: int, loss: float) -> None:
            if step == steps or time.monotonic() - self._said >= SAY_S:
                self._said = time.monotonic()
                say(f"round {self._round}: step {step}/{steps}, loss {loss:.3f}")

        return replace(device, on_step=on_step, tuned=self._folder.tuned / f"{self._run}.safetensors")

    def answer(self, message: Message, context: Context) -> Message:
        """The reply to a message; what the device remembers is on its disk then.

        Only the run's configuration is taken from the server, within what the owner allows. Number, data and budget
        are the device's own.
        """
        try:
            if message.metadata.message_type == DESCRIBE:
                check_version(message)  # before the configuration, which may be another version's
            self._run = str(context.run_config.get("run"))
            memory = RunMemory(self._folder.memory, self._run)  # checks the key
            config = _with_room(self._allowed.config_of(str(context.run_config.get("config"))), self._number)
            kind = message.metadata.message_type
            if kind == DESCRIBE:
                self._allowed.check_task(config.data, task_of(message))
            if kind in (PLAN, TRAIN):
                self._round = _round_of(message)
            if kind == PLAN:
                say(f"round {self._round}")
            if kind == TUNE:
                say(f"after the last round: {config.evaluation.tune_steps} steps more, for this device itself")
            # A context of its own: Flower's would give what is written into it back with the next message.
            own = Context(
                run_id=context.run_id,
                node_id=context.node_id,
                node_config=self._allowed.node_config(self._number),
                state=memory.recall(self._round if kind in (PLAN, TRAIN) else None, plans=kind == PLAN),
                run_config={"config": run_config_toml(config).decode()},
            )
            reply = self._app(message, own)
            memory.keep(own.state)
        except (UserError, InvalidReplyError, InvalidRequestError, OtherVersionError) as error:
            logger.error("%s", error)
            return Message(trouble_reply(trouble_of(error), private=True), reply_to=message)
        if kind == TRAIN and "status" not in facts_of(reply):
            say(f"round {self._round}: answered")
        if kind == MEASURE and facts_of(reply).get("own_rows"):
            say("told the server, in counts, what this device gained")
        if kind == PERSONAL and facts_of(reply).get("own_rows"):
            say(f"round {self._round}: told the server, in counts, how good the model is on this device's own rows")
        if kind == TUNE and "status" not in facts_of(reply):
            say(f"its experts are in {self._folder.tuned / self._run}.safetensors, and nowhere else")
        return reply


def _with_room(config: RunConfig, number: int) -> RunConfig:
    """The configuration of a run with a place for client `number`, which may be invited after the run began."""
    count = max(config.clients.count, number + 1)
    return config.model_copy(update={"clients": config.clients.model_copy(update={"count": count})})


def _round_of(message: Message) -> int:
    round: Any = facts_of(message).get("round")
    return round if isinstance(round, int) and round >= 0 else 0


def say(text: str) -> None:
    """Write a line for the device's owner."""
    print(text, flush=True)


def work(worker: Worker, port: int, secret: bytes) -> None:
    """Answer messages until the process is ended. The SuperNode may start later, and be started again."""
    address = f"{LOOPBACK}:{port}"
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    executor = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE})
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    with RuntimeHttpClient.from_server_address(address, True, None, [version, executor]) as client:
        pause = Pause(POLL_S, MOST_POLL_S)
        while True:
            try:
                found = client.AcquireTask(wanted)
                if found.HasField("task") and found.token:
                    token = RuntimeTokenHttpInterceptor(found.token)
                    with RuntimeHttpClient.from_server_address(address, True, None, [version, token]) as one:
                        _one_task(worker, one)
                    pause.reset()
                    continue
            except httpx.HTTPError as error:
                logger.debug("the SuperNode does not answer: %s", error)
            pause.wait()


def _one_task(worker: Worker, client: RuntimeHttpClient) -> None:
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        message, context, _, _ = pull_task_input(client)
        reply = worker.answer(message, context)
        push_message(client, reply, context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    finally:
        heartbeat.stop()


def _ended(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)  # so that a note of what it attempts is deleted: this is no kill for memory


def main(path: Path, only_check: bool = False) -> int:
    """Check, tell the server what was found, then work; returns the exit code."""
    signal.signal(signal.SIGTERM, _ended)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder = DeviceFolder(path)
    asked = json.loads(folder.settings.read_text(encoding="utf-8"))
    allowed = replace(Allowed.from_json(asked["allowed"]), asked=folder.asked)
    invitation = read_invitation(Path(asked["invitation"]))
    key = None if asked["key"] is None else Path(asked["key"])
    failed = set()
    for finding in check(invitation, key, allowed, telling=True):
        failed |= set() if finding.fits else {finding.about}
        say(finding.line)
    if failed:
        return AGAIN if failed == {SERVER} else DOES_NOT_FIT
    if only_check:
        return 0
    with disk_errors(folder.ready, "join again"):
        folder.ready.touch()
    work(Worker(allowed, invitation.number, folder), int(asked["port"]), folder.secret.read_bytes())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:] == ["--check"]))
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
