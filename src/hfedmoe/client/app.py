"""The Flower ClientApp of a client: it answers describe, plan, train, personal, measure and tune requests."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load as read_blob
from safetensors.torch import save as write_blob
from torch import Tensor

from hfedmoe.client.attempt import attempt
from hfedmoe.client.device import Device
from hfedmoe.client.history import ClientHistory
from hfedmoe.client.lasting import MEASURED, TUNED
from hfedmoe.client.once import answer_of, keep_answer
from hfedmoe.client.personal import mark_of, require_due
from hfedmoe.client.place import Place
from hfedmoe.client.policy import PolicyError
from hfedmoe.client.spent import FIRST_PASS, counted
from hfedmoe.client.tuning import keep, tune
from hfedmoe.errors import DiskError, OwnDataError, UserError
from hfedmoe.events import OwnResult, OwnScore
from hfedmoe.method.row import CannotHoldError
from hfedmoe.models.digest import tokenizer_digest
from hfedmoe.moe.payload import MismatchError
from hfedmoe.wire import requests
from hfedmoe.wire.messages import (
    Description,
    InvalidReplyError,
    Plan,
    describe_reply,
    measure_reply,
    plan_reply,
    train_reply,
    trouble_reply,
    usage_of,
)
from hfedmoe.wire.same import NO_DIGESTS, Digests, OtherModelError, require_base, require_tokenizer
from hfedmoe.wire.trouble import (
    DISK,
    FAILED,
    FAULT,
    OUT_OF_MEMORY,
    OWN_DATA,
    REFUSED,
    REQUEST,
    SETTINGS,
    TOO_SMALL,
    VERSION,
    Trouble,
)

HISTORY = "history"
OWN_EXPERTS = "own experts"
"""What a simulated client trained for itself; a real device keeps it in a file."""

logger = logging.getLogger(__name__)
Handler = Callable[[Message, Context], RecordDict]
Last = Callable[[Device, ClientHistory, list[Tensor], dict[str, Tensor]], OwnResult | OwnScore]
"""Something that a client does with the model, and says in numbers."""


def client_app(
    device_of: Callable[[Message, Context], Device],
    place_of: Callable[[Context], Place | None] = lambda context: None,
    private: bool = False,
) -> ClientApp:
    """The ClientApp of one or more clients.

    Args:
        device_of: returns a client's device, new or kept ready, for a message and Flower's context.
        place_of: returns what is known about the device without its model; None: the model must be opened.
        private: for real devices: only codes and counts reach the server, no text (`wire.trouble`).
    """
    app = ClientApp()

    def answering(handler: Handler) -> Callable[[Message, Context], Message]:
        """The handler as Flower calls it; with `private`, an error becomes a trouble reply."""

        def answer(message: Message, context: Context) -> Message:
            if not private:
                return Message(handler(message, context), reply_to=message)
            try:
                content = handler(message, context)
            except Exception as error:  # of any kind: Flower would send its text to the server
                trouble = trouble_of(error)
                if trouble.code == FAULT:
                    logger.exception("this request could not be answered")
                else:
                    logger.error("%s", error)
                content = trouble_reply(trouble, private=True)
            return Message(content, reply_to=message)

        return answer

    def open_device(message: Message, context: Context) -> Device | Trouble:
        """The device, or the trouble if its model cannot be opened."""
        opened = attempt(lambda: device_of(message, context))
        if isinstance(opened, Trouble):
            return Trouble(opened.status, f"{opened.reason}, while it opened the model", opened.code)
        return opened

    def refuse(trouble: Trouble) -> RecordDict:
        if private:
            logger.warning("%s: %s", trouble.status, trouble.reason)
        return trouble_reply(trouble, private)

    def describe(message: Message, context: Context) -> RecordDict:
        requests.check_version(message)
        device = open_device(message, context)
        if isinstance(device, Trouble):
            return refuse(device)
        digests = _digests(device)
        try:
            _require_same(device, digests, requests.digests_of(message))
        except OtherModelError as error:
            return refuse(Trouble(REFUSED, str(error), error.code))
        place = device.place
        allowed = place.allowed(_remember(context, place))
        # A limit that it learned may grow again within its budget; only a server that plans must know it.
        room = place.budget if place.method.assign is None else max(1, allowed)
        budget = room if place.told is None else place.told
        examples = len(device.examples)
        return describe_reply(Description(device.number, device.name, examples, budget, place.num_experts, digests))

    def plan(message: Message, context: Context) -> RecordDict:
        known = place_of(context)
        if known is not None:
            history = _remember(context, known)
            if history.limit == 0 or known.knows_its_scores(history):
                return planned(message, context, known, history, _no_first_pass)
        device = open_device(message, context)
        if isinstance(device, Trouble):
            return refuse(device)
        place = device.place
        history = _remember(context, place)

        def work() -> RecordDict:
            return planned(message, context, place, history, partial(_first_pass, context, device))

        return tried(context, device, history, "plan", place.allowed(history), work)

    def planned(
        message: Message,
        context: Context,
        place: Place,
        history: ClientHistory,
        first_pass: Callable[[ClientHistory], None],
    ) -> RecordDict:
        """The answer to a plan request."""
        if history.limit == 0:
            return refuse(Trouble(OUT_OF_MEMORY, place.cannot, OUT_OF_MEMORY, place.smallest))
        round = requests.round_of(message, place.config.federation.rounds)
        usage = usage_of(message, place.num_experts)
        if place.method.needs_usage:
            history.federation = usage
        try:
            content = plan_reply(_plan(place, history, round, usage, first_pass))
        except CannotHoldError as error:
            return refuse(Trouble(TOO_SMALL, str(error), TOO_SMALL))
        _write_history(context, history)
        return content

    def asked(message: Message, context: Context) -> tuple[Device, ClientHistory] | RecordDict:
        """The device and its history for a request that needs its model; or the reply if that cannot be opened."""
        device = open_device(message, context)
        return refuse(device) if isinstance(device, Trouble) else (device, _remember(context, device.place))

    def with_experts(
        message: Message,
        context: Context,
        device: Device,
        history: ClientHistory,
        doing: str,
        work: Callable[[list[Tensor]], RecordDict],
    ) -> RecordDict:
        """Do a work with the experts that the request names, bool [E] per layer."""
        place = device.place
        resident = requests.residents_of(message, place.num_experts, place.at_least, place.allowed(history))
        held = sum(int(keep.sum()) for keep in resident)
        return tried(context, device, history, doing, held, lambda: work(resident))

    def train_round(message: Message, context: Context) -> RecordDict:
        found = asked(message, context)
        if isinstance(found, RecordDict):
            return found
        device, history = found
        round = requests.round_of(message, device.config.federation.rounds)

        def work(resident: list[Tensor]) -> RecordDict:
            tensors = requests.trainables_of(message)
            with counted(context.state, device.policy, round, device.config.train.steps, device.clock) as policy:
                update = device.within(policy).train(history, resident, tensors, round)
            device.place.trained(history)
            if requests.plans_next(message) and round < device.config.federation.rounds:
                with contextlib.suppress(CannotHoldError):  # the server asks, and is told
                    update.next = _plan(device.place, history, round + 1, None, _no_first_pass)
            return train_reply(update)

        return with_experts(message, context, device, history, "train", work)

    def once(message: Message, context: Context, doing: str, mark: str, work: Last) -> RecordDict:
        """Answer a request once (`client.once`)."""
        answer = answer_of(context.state, mark, message)
        if answer is not None:
            return answer
        found = asked(message, context)
        if isinstance(found, RecordDict):
            return found
        device, history = found
        if not history.rounds:
            raise requests.InvalidRequestError(f"to {doing} comes after training")

        def answered(resident: list[Tensor]) -> RecordDict:
            return measure_reply(work(device, history, resident, requests.trainables_of(message)))

        done = with_experts(message, context, device, history, doing, answered)
        keep_answer(context.state, mark, message, done)
        return done

    def personal(message: Message, context: Context) -> RecordDict:
        round = requests.round_of(message, requests.MOST["federation.rounds"])

        def work(device: Device, *given: Any) -> OwnScore:
            require_due(device.config, round)
            return device.score(*given)

        return once(message, context, "measure", mark_of(context.state, round), work)

    def measure(message: Message, context: Context) -> RecordDict:
        return once(message, context, "measure", MEASURED, Device.measure)

    def tune_experts(message: Message, context: Context) -> RecordDict:
        def work(device: Device, *given: Any) -> OwnResult:
            steps = device.config.evaluation.tune_steps
            if not steps:
                raise requests.InvalidRequestError("the run's settings have no evaluation.tune_steps")
            device.policy.check_tuning(steps)
            told, tuned = tune(device, *given)
            blob = keep(device, tuned)
            if blob is not None:
                context.state[OWN_EXPERTS] = ConfigRecord({"blob": blob})
            return told

        return once(message, context, "tune", TUNED, work)

    def tried(
        context: Context, device: Device, history: ClientHistory, doing: str, held: int, work: Callable[[], RecordDict]
    ) -> RecordDict:
        """Do the work and return the reply; after a trouble only its lesson and the step times enter the history."""
        place = device.place
        with place.note.attempting(doing, held):
            done = attempt(work)
        if isinstance(done, Trouble):
            device.model.release()
            before = _read_history(context, place)
            before.step_times = history.step_times
            history = before
            taught = place.learn(done, history, doing, held)
            done = refuse(Trouble(taught.status, taught.reason, done.code, held))
        _write_history(context, history)
        return done

    app.query("describe")(answering(describe))
    app.query("plan")(answering(plan))
    app.query("personal")(answering(personal))
    app.query("measure")(answering(measure))
    app.train("tune")(answering(tune_experts))
    app.train()(answering(train_round))
    return app


def _plan(
    place: Place,
    history: ClientHistory,
    round: int,
    usage: list[Tensor] | None,
    first_pass: Callable[[ClientHistory], None],
) -> Plan:
    """What the client will hold; for a method that plans on the server, its scores. Raises CannotHoldError."""
    if place.method.assign is not None:
        return Plan(contribution=place.contribution(history, round, usage, first_pass))
    return Plan(place.plan(history, round, usage, first_pass))


def _first_pass(context: Context, device: Device, history: ClientHistory) -> None:
    """The first pass, within what the device's owner allows; with random scores if it was asked for too often."""
    try:
        with counted(context.state, device.policy, FIRST_PASS, device.first_steps, device.clock) as policy:
            device.within(policy).first_pass(history)
    except PolicyError as error:
        logger.warning("%s; it starts with random experts", error)
        history.prior = device.place.draw(0)


def _no_first_pass(history: ClientHistory) -> None:
    raise AssertionError("a plan without a model asked for a pass over the data")


def trouble_of(error: Exception) -> Trouble:
    """What a real device tells the server about an exception."""
    if isinstance(error, PolicyError | OtherModelError):
        return Trouble(REFUSED, "", error.code)
    if isinstance(error, OwnDataError):
        return Trouble(REFUSED, "", OWN_DATA)
    if isinstance(error, DiskError):
        return Trouble(FAILED, "", DISK)
    if isinstance(error, UserError):
        return Trouble(REFUSED, "", SETTINGS)
    if isinstance(error, requests.OtherVersionError):
        return Trouble(REFUSED, "", VERSION)
    if isinstance(error, requests.InvalidRequestError | InvalidReplyError | MismatchError):
        return Trouble(REFUSED, "", REQUEST)
    return Trouble(FAILED, "", FAULT)


def _digests(device: Device) -> Digests:
    """Of a device's model; empty for simulated clients."""
    return Digests(device.base, tokenizer_digest(device.encoder.tokenizer)) if device.base else NO_DIGESTS


def _require_same(device: Device, own: Digests, servers: Digests) -> None:
    """Raise OtherModelError if a device's base model or tokenizer is not what the server says that it has."""
    name = device.config.model.name
    if servers.base:
        require_base(name, own.base, servers.base)
    if servers.tokenizer:
        require_tokenizer(name, own.tokenizer, servers.tokenizer)


def _remember(context: Context, place: Place) -> ClientHistory:
    """The client's history. If its last attempt was killed, its budget becomes smaller first."""
    history = _read_history(context, place)
    killed = place.note.take_killed()
    if killed is not None:
        trouble = Trouble(OUT_OF_MEMORY, "its process was killed")
        logger.warning("%s: %s", place.name, place.learn(trouble, history, killed.doing, killed.experts).reason)
        _write_history(context, history)
    return history


def history_of(context: Context, place: Place) -> ClientHistory:
    """What a client remembers, from its state."""
    return _read_history(context, place)


def _read_history(context: Context, place: Place) -> ClientHistory:
    kept = context.state.config_records.get(HISTORY)
    if kept is None:
        return ClientHistory.new(place.num_experts)
    blob = kept["blob"]
    assert isinstance(blob, bytes)
    return ClientHistory.from_tensors(read_blob(blob), place.num_experts)


def _write_history(context: Context, history: ClientHistory) -> None:
    context.state[HISTORY] = ConfigRecord({"blob": write_blob(history.to_tensors())})
