"""Which updates a round takes, where training may outlive it: over-selection, a deadline, late updates, no rounds.

* `rounds`: the round goes on with the first `clients_per_round` updates, or after `round_s` with at least
  `min_clients`. With `late = "fold"` an update that comes later counts in the round in which it comes.
* `async`: whatever comes counts; after `buffer` updates the model changes. Who has answered goes on at once with the
  newest model if all clients work; if only `clients_per_round` do, free places are drawn anew when the model changes.
"""

import time
from collections.abc import Callable, Iterator

from hfedmoe.config.federation import FederationConfig
from hfedmoe.server.members import reply_of
from hfedmoe.server.works import Work, Works
from hfedmoe.wire.exchange import Answer
from hfedmoe.wire.messages import InvalidReplyError
from hfedmoe.wire.order import Shelf


def buffer_of(settings: FederationConfig, clients: int) -> int:
    """Updates that change the model in mode async."""
    return settings.buffer or max(1, (settings.clients_per_round or clients) // 2)


def collect(
    works: Works,
    settings: FederationConfig,
    round: int,
    asked: int,
    clients: int,
    again: Callable[[Work, Answer], None],
) -> Iterator[tuple[Work, Answer]]:
    """The answers that count in a round, by the round in which they were asked for and then by client.

    Args:
        asked: clients that were asked in this round.
        clients: of the federation.
        again: called for every update in mode async, which may ask its client again.
    """
    until = None if settings.round_s is None else time.monotonic() + settings.round_s
    is_async = settings.mode == "async"
    wanted = buffer_of(settings, clients) if is_async else min(settings.clients_per_round or asked, asked)
    fresh = total = 0

    def goes_on() -> bool:
        if total < settings.min_clients:
            return works.waits
        if is_async:
            return total < wanted and works.waits
        if fresh >= wanted and asked:
            return False
        own = works.waits_for(round)
        return own and (until is None or time.monotonic() < until)

    shelf, by_key = Shelf(), dict[tuple[int, ...], list[Work]]()
    for work, answer in works.answers(goes_on):
        if work.dropped:
            continue
        good = _is_update(answer)
        total += good
        fresh += good and work.round == round
        key: tuple[int, ...] = (work.round, work.member.about.client)
        by_key.setdefault(key, []).append(work)
        shelf.put(key, answer)
        if good and is_async and total < wanted:
            again(work, answer)
        del answer
    works.take_back()
    for key, answer in shelf.take():
        yield by_key[key].pop(0), answer
        del answer


def _is_update(answer: Answer) -> bool:
    try:
        reply_of(answer)
    except InvalidReplyError:
        return False
    return True
