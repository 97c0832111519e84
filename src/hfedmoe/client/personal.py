"""Requests to measure the model while a run goes on: one for each round in which the run's settings ask for it.

A device answers for one model per round (`client.once`), and the answers last (`client.lasting`): a server that takes
it back to an earlier round learns nothing more. Answers of rounds that are long over are forgotten, and so are these
rounds not answered any more.
"""

from flwr.app import RecordDict

from hfedmoe.client.lasting import PREFIX
from hfedmoe.config import RunConfig
from hfedmoe.wire.requests import InvalidRequestError

PERSONAL = f"{PREFIX}personal/"
"""What the names of the answers begin with; the number of the round follows."""
ROUNDS = 16
"""Rounds, up to the last one that was answered, whose answers are remembered."""


def mark_of(state: RecordDict, round: int) -> str:
    """The name of a round's answer; those of rounds that are long over are dropped.

    Raises:
        InvalidRequestError: this round is long over.
    """
    names = [name for name in state if name.startswith(PERSONAL)]
    known = {name: int(name.removeprefix(PERSONAL).partition("/")[0]) for name in names}
    last = max(known.values(), default=0)
    if round <= last - ROUNDS:
        raise InvalidRequestError(f"round {round} is long over: it has answered in round {last}")
    for name, told in known.items():
        if told <= max(last, round) - ROUNDS:
            del state[name]
    return f"{PERSONAL}{round}"


def require_due(config: RunConfig, round: int) -> None:
    """Raise InvalidRequestError if the run's settings do not ask for it in this round."""
    every = config.evaluation.personal_every
    if not every or round % every or round > config.federation.rounds:
        raise InvalidRequestError(f"the run's settings ask for no measurement in round {round}")
