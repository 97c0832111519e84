"""What sites gained, from counts: of real devices, which tell them, and of simulated clients (`gains.site_gains`)."""

from collections.abc import Iterable, Mapping

from hfedmoe.config import RunConfig
from hfedmoe.events import OwnResult, Score, SiteGain, Watcher
from hfedmoe.server.intervals import difference_interval, share_interval
from hfedmoe.server.members import Member, reply_of
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import Answer, clean
from hfedmoe.wire.messages import InvalidReplyError


def ask_sites(
    answers: Iterable[Answer],
    members: Mapping[int, Member],
    config: RunConfig,
    choices: bool,
    watcher: Watcher,
) -> list[SiteGain]:
    """What devices answered to the request to measure, in the order of their numbers; who did not is left out.

    Args:
        members: by node.
        choices: whether the task has choices.
    """
    found: list[SiteGain] = []
    for answer in answers:
        about = members[answer.node].about
        try:
            told = checks.own_result(reply_of(answer), config.evaluation.own_rows, choices)
        except InvalidReplyError as error:
            watcher.warning(f"{about.name} does not say what it gained: {clean(str(error))}")
            continue
        if told.own_rows:
            found.append(gain_of(about.client, about.name, told))
    return sorted(found, key=lambda gain: gain.client)


def gain_of(client: int, name: str, told: OwnResult) -> SiteGain:
    """A device's answer as an entry of the table; its classes stay on the device."""
    after = None
    if told.right_before is not None and told.won is not None and told.lost is not None:
        after = told.right_before + told.won - told.lost
    gain, interval = gained(told)
    return SiteGain(
        client=client,
        name=name,
        trained_rows=told.trained_rows,
        own_rows=told.own_rows,
        labels={},
        num_labels=0,
        before=score_of(told.right_before, told.own_rows, told.f1_before, told.loss_before),
        federated=score_of(after, told.own_rows, told.f1_after, told.loss_after),
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
