"""How many steps and seconds a device has worked for each round of a run, so that its owner's limits hold for a round.

A server that was killed asks for its round again, and a device then trains it again from the same history. So a round
may take its limits `TIMES` times in all, and not more: else a server could have any number of steps by asking for the
same round. The counts last (`client.lasting`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, RecordDict

from hfedmoe.client.lasting import SPENT
from hfedmoe.client.policy import Policy, PolicyError
from hfedmoe.device.pace import Clock
from hfedmoe.wire.trouble import POLICY_ROUND

TIMES = 3
"""How often a round may take what the owner allows per round: once, and twice more for a server that goes on."""
ROUNDS = 16
"""Rounds before the highest one that are counted; earlier ones are over."""
FIRST_PASS = 0
"""The number under which the first pass is counted, which belongs to no round."""


@dataclass
class Spent:
    """What a device worked in a run, by the number of the round."""

    steps: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, state: RecordDict) -> "Spent":
        """From Flower's state."""
        kept = state.config_records.get(SPENT)
        if kept is None:
            return cls()
        rounds: list[int] = list(kept["rounds"])  # type: ignore[arg-type]
        columns = (kept["steps"], kept["seconds"])
        return cls(*(dict(zip(rounds, column, strict=True)) for column in columns))  # type: ignore[arg-type]

    def write(self, state: RecordDict) -> None:
        """Into Flower's state: the first pass and the last rounds."""
        last = max(self.steps, default=0)
        rounds = sorted(round for round in self.steps if round > last - ROUNDS or round == FIRST_PASS)
        state[SPENT] = ConfigRecord(
            {
                "rounds": rounds,
                "steps": [self.steps[round] for round in rounds],
                "seconds": [self.seconds[round] for round in rounds],
            }
        )

    def left(self, policy: Policy, round: int, steps: int) -> Policy:
        """What the owner allows for `steps` more steps of this round.

        Raises:
            PolicyError: the round has had all that it may have, or is long over.
        """
        what = "the first pass" if round == FIRST_PASS else f"round {round}"
        again = f"the server asks for {what} again, which"
        if round != FIRST_PASS and round <= max(self.steps, default=0) - ROUNDS:
            raise PolicyError(f"{again} is long over", POLICY_ROUND)
        done, seconds = self.steps.get(round, 0), self.seconds.get(round, 0.0)
        if policy.max_steps is not None and done + steps > TIMES * policy.max_steps:
            raise PolicyError(
                f"{again} has had {done} steps; max-steps of this device is {policy.max_steps}, and {TIMES} times that "
                "in all if a round is asked for again",
                POLICY_ROUND,
            )
        if policy.max_seconds is None:
            return policy
        rest = TIMES * policy.max_seconds - seconds
        if rest <= 0:
            raise PolicyError(
                f"{again} has had {seconds:.0f} s; max-seconds of this device is {policy.max_seconds:g}, and {TIMES} "
                "times that in all if a round is asked for again",
                POLICY_ROUND,
            )
        return replace(policy, max_seconds=min(rest, policy.max_seconds))


@contextmanager
def counted(state: RecordDict, policy: Policy, round: int, steps: int, clock: Clock) -> Iterator[Policy]:
    """Count the work of the block, also if it fails, and give what its owner allows for it.

    Args:
        state: of the client, where the counts are kept.
        steps: that the block may do, counted before it begins.
        clock: for its seconds.

    Raises:
        PolicyError: the round has had all that it may have.
    """
    if policy.max_steps is None and policy.max_seconds is None:
        yield policy
        return
    spent = Spent.of(state)
    allowed = spent.left(policy, round, steps)
    spent.steps[round] = spent.steps.get(round, 0) + steps
    spent.seconds.setdefault(round, 0.0)
    spent.write(state)
    began = clock()
    try:
        yield allowed
    finally:
        spent.seconds[round] += clock() - began
        spent.write(state)
