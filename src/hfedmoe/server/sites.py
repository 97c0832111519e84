"""What sites gained, from counts: of devices, which tell them, and of simulated clients (`gains.site_gains`).

After the last round clients are asked to measure, and to go on training for themselves. They answer with counts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from hfedmoe.config import RunConfig
from hfedmoe.events import OwnResult, Score, SiteGain, Tuning, Watcher
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.intervals import difference_interval, share_interval
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.members import Member, reply_of
from hfedmoe.server.recall import recall
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import Request, clean
from hfedmoe.wire.messages import MEASURE, TUNE, InvalidReplyError


class Asks(Protocol):
    """The server, as far as it is needed here."""

    config: RunConfig
    keeper: Keeper
    watcher: Watcher
    round: int
    num_experts: list[int]

    def last_request(self, member: Member, kind: str) -> Request: ...


def ask_sites(server: Asks, attendance: Attendance) -> None:
    """Let devices measure what the federation gave to them and go on training for themselves, once in a run."""
    settings, keeper = server.config.evaluation, server.keeper
    if not (settings.own_share or settings.tune_steps) or keeper.knows_sites(server.round):
        return
    if keeper.folder is not None:
        recall(attendance, keeper.folder, server.num_experts)  # a run that is resumed after its last round
    gains: list[SiteGain] = []
    if settings.own_share:
        server.watcher.phase("the devices measure what they gained")
        answers = _answers(server, attendance, MEASURE)
        gains = [gain_of(member, told) for member, told in answers if told.own_rows]
        gains.sort(key=lambda gain: gain.client)
    if settings.tune_steps:
        gains = with_tuning(gains, ask_to_tune(server, attendance), settings.tune_steps)
    keeper.save_sites(server.round, gains)


def ask_to_tune(
    server: Asks, attendance: Attendance, tuned: Callable[[Member], None] = lambda member: None
) -> dict[int, OwnResult]:
    """Let clients go on training the experts that they hold, for themselves; what each gained, by its number.

    Args:
        tuned: called for every client that has done so.
    """
    server.watcher.phase(f"clients train on for themselves: {server.config.evaluation.tune_steps} steps")
    found = {}
    for member, told in _answers(server, attendance, TUNE):
        tuned(member)
        found[member.about.client] = told
    return found


WORDS = {MEASURE: "does not say what it gained", TUNE: "does not train on for itself"}


def _answers(server: Asks, attendance: Attendance, kind: str) -> Iterator[tuple[Member, OwnResult]]:
    """Ask all clients that planned something, with the final model; who does not answer as it may is left out."""
    asked = {member.node: member for member in attendance.members.values() if member.resident_bits}
    scores, most_rows = server.keeper.scores, server.config.evaluation.own_rows
    choices = bool(scores) and scores[0].accuracy is not None
    requests = (server.last_request(member, kind) for member in asked.values())
    for answer in attendance.ask(requests, kind):
        member = asked[answer.node]
        try:
            yield member, checks.own_result(reply_of(answer), most_rows, choices)
        except InvalidReplyError as error:
            server.watcher.warning(f"{member.about.name} {WORDS[kind]}: {clean(str(error))}")


def with_tuning(gains: Iterable[SiteGain], told: Mapping[int, OwnResult], steps: int) -> list[SiteGain]:
    """The gains, with what sites gained by training further for themselves, where they say so."""
    return [
        replace(gain, tuning=_tuning(told[gain.client], steps))
        if gain.client in told and told[gain.client].own_rows
        else gain
        for gain in gains
    ]


def _tuning(told: OwnResult, steps: int) -> Tuning:
    before, after = _scores(told)
    return Tuning(steps, before, after, *gained(told))


def _scores(told: OwnResult) -> tuple[Score, Score]:
    """Of the model before and after, from counts."""
    after = None
    if told.right_before is not None and told.won is not None and told.lost is not None:
        after = told.right_before + told.won - told.lost
    return (
        score_of(told.right_before, told.own_rows, told.f1_before, told.loss_before),
        score_of(after, told.own_rows, told.f1_after, told.loss_after),
    )


def gain_of(member: Member, told: OwnResult) -> SiteGain:
    """A device's answer as an entry of the table; its classes stay on the device.

    It measures its sub-model, which is the shared model only if it holds every expert.
    """
    before, after = _scores(told)
    gain, interval = gained(told)
    return SiteGain(
        client=member.about.client,
        name=member.about.name,
        trained_rows=told.trained_rows,
        own_rows=told.own_rows,
        labels={},
        num_labels=0,
        before=before,
        federated=after if member.holds_all else None,
        own=after,
        gain=gain,
        gain_interval=interval,
    )


def gained(told: OwnResult) -> tuple[float | None, tuple[float, float] | None]:
    """The difference of the accuracies after and before, and its interval; None for tasks without choices."""
    if told.won is None or told.lost is None:
        return None, None
    return (told.won - told.lost) / told.own_rows, difference_interval(told.won, told.lost, told.own_rows)


def score_of(right: int | None, rows: int, f1: float | None, loss: float) -> Score:
    """A score from the number of right answers among so many rows; `right` is None for tasks without choices."""
    if right is None:
        return Score(None, f1, loss)
    return Score(right / rows, f1, loss, share_interval(right, rows))
