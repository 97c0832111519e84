"""What real devices say that the federation gave to them; simulated clients are measured by `gains.site_gains`."""

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
    rows = told.own_rows
    before = after = gain = interval = None
    if told.right_before is not None and told.won is not None and told.lost is not None:
        before, after = told.right_before, told.right_before + told.won - told.lost
        gain, interval = (told.won - told.lost) / rows, difference_interval(told.won, told.lost, rows)
    return SiteGain(
        client=client,
        name=name,
        trained_rows=told.trained_rows,
        own_rows=rows,
        labels={},
        num_labels=0,
        before=_score(before, rows, told.f1_before, told.loss_before),
        federated=_score(after, rows, told.f1_after, told.loss_after),
        gain=gain,
        gain_interval=interval,
    )


def _score(right: int | None, rows: int, f1: float | None, loss: float) -> Score:
    if right is None:
        return Score(None, f1, loss)
    return Score(right / rows, f1, loss, share_interval(right, rows))
