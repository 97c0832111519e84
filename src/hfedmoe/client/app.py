"""The client: a Flower ClientApp that describes its device, has it plan what it holds, and train."""

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load as read_blob
from safetensors.torch import save as write_blob

from hfedmoe.client.device import Device, cannot
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.trouble import attempt
from hfedmoe.method.methods import CannotHoldError
from hfedmoe.wire.messages import (
    Description,
    describe_reply,
    facts_of,
    plan_reply,
    tensors_of,
    train_reply,
    trouble_reply,
    unpack_bits,
    usage_of,
    wish_reply,
)
from hfedmoe.wire.trouble import OUT_OF_MEMORY, TOO_SMALL, Trouble

HISTORY = "history"

logger = logging.getLogger(__name__)


def client_app(device_of: Callable[[Context], Device]) -> ClientApp:
    """The ClientApp whose clients `device_of` makes (or keeps ready) from Flower's context."""
    app = ClientApp()

    def open_device(context: Context) -> Device | Trouble:
        """The device, or that its model does not even open."""
        opened = attempt(lambda: device_of(context))
        if isinstance(opened, Trouble):
            return Trouble(opened.status, f"{opened.reason}, while it opened the model")
        return opened

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        device = open_device(context)
        if isinstance(device, Trouble):
            return Message(trouble_reply(device), reply_to=message)
        limit = _remember(context, device).limit
        budget = device.budget if limit is None else max(1, min(device.budget, limit))
        description = Description(device.number, device.name, len(device.examples), budget, device.model.num_experts)
        return Message(describe_reply(description), reply_to=message)

    @app.query("plan")
    def plan(message: Message, context: Context) -> Message:
        device = open_device(context)
        if isinstance(device, Trouble):
            return Message(trouble_reply(device), reply_to=message)
        history = _remember(context, device)
        if history.limit == 0:
            return Message(trouble_reply(Trouble(OUT_OF_MEMORY, cannot(device))), reply_to=message)
        round = int(facts_of(message)["round"])  # type: ignore[arg-type]
        usage = usage_of(message, device.model.num_experts)

        def work() -> RecordDict:
            if device.learner.method.assign is not None:
                return wish_reply(device.contribution(history, round, usage))
            try:
                return plan_reply(device.plan(history, round, usage))
            except CannotHoldError as error:
                return trouble_reply(Trouble(TOO_SMALL, str(error)))

        content = _try(context, device, history, "plan", device.allowed(history), work)
        return Message(content, reply_to=message)

    @app.train()
    def train_round(message: Message, context: Context) -> Message:
        device = open_device(context)
        if isinstance(device, Trouble):
            return Message(trouble_reply(device), reply_to=message)
        history = _remember(context, device)
        facts = facts_of(message)
        resident = unpack_bits(facts["resident"], device.model.num_experts)

        def work() -> RecordDict:
            return train_reply(device.train(history, resident, tensors_of(message), int(facts["round"])))  # type: ignore[arg-type]

        held = sum(int(keep.sum()) for keep in resident)
        return Message(_try(context, device, history, "train", held, work), reply_to=message)

    return app


def _try(
    context: Context, device: Device, history: ClientHistory, doing: str, held: int, work: Callable[[], RecordDict]
) -> RecordDict:
    """The reply to a request, and the history with it: after a trouble as it was before, but for what that taught."""
    with device.note.attempting(doing, held):
        done = attempt(work)
    if isinstance(done, Trouble):
        device.model.release()
        before = _read_history(context, device)
        before.step_times = history.step_times
        history = before
        done = trouble_reply(device.learn(done, history, doing, held))
    _write_history(context, history)
    return done


def _remember(context: Context, device: Device) -> ClientHistory:
    """The client's history; if its last attempt was killed, with the smaller budget that this teaches."""
    history = _read_history(context, device)
    killed = device.note.take_killed()
    if killed is not None:
        trouble = Trouble(OUT_OF_MEMORY, "its process was killed")
        logger.warning("%s: %s", device.name, device.learn(trouble, history, killed.doing, killed.experts).reason)
        _write_history(context, history)
    return history


def _read_history(context: Context, device: Device) -> ClientHistory:
    kept = context.state.config_records.get(HISTORY)
    if kept is None:
        return ClientHistory.new(device.model.num_experts)
    blob = kept["blob"]
    assert isinstance(blob, bytes)
    return ClientHistory.from_tensors(read_blob(blob), device.model.num_experts)


def _write_history(context: Context, history: ClientHistory) -> None:
    context.state[HISTORY] = ConfigRecord({"blob": write_blob(history.to_tensors())})
