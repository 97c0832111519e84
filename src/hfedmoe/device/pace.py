"""How a client keeps a deadline: how many steps it does in a round, and how many experts each of them may train.

A training step takes longer the more experts per layer get a gradient. The client remembers how long its steps took
(`StepTimes`) and decides before every step (`Pace`):

1. Keep all configured steps. If needed, lower the number of experts per layer that a step may train, down to top-k.
2. If that is still too slow, do as many steps as fit, but at least one. The remaining time is used for more experts
   per layer again.
3. Never start a step that is expected to end after the deadline, except the first.

In the first round nothing is measured: the first step trains as many experts as configured, and its time decides the
others.

If the forward pass of the first step takes more than PATIENCE deadlines and a lower level is left, the step is given
up. Its expected time is remembered, so the next round begins lower. At the lowest level the step is completed, however
late. This is pure logic, without a model, and the clock can be replaced.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PATIENCE = 3.0
DECAY = 0.9
"""Factor on the weight of all earlier steps after each step, because a device's speed changes."""
VARIABLE_SHARE = 0.5
"""Part of a step's time that is proportional to the experts it trains: assumed until measured."""
TRUST = 0.01
"""Weight of that assumption: that of one step whose level is a tenth above or below the mean level."""
_ROUNDING = 1e-9
_SHORTEST_S = 1e-6
"""Least time of a step: a coarse clock may measure 0."""

Clock = Callable[[], float]


@dataclass
class StepTimes:
    """Seconds of a step = fixed + slope x experts per layer that it may train, from all steps so far.

    The line goes through the (decayed) mean of the measurements. With levels x_i, seconds t_i, weights w_i and
    means X and T its slope is

        (sum_i w_i (x_i - X)(t_i - T) + TRUST X^2 b) / (sum_i w_i (x_i - X)^2 + TRUST X^2),   b = VARIABLE_SHARE T / X

    kept within [0, T / X], so that neither part of the time is negative.
    """

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Decayed sums of 1, x, t, x^2 and x t."""

    @property
    def measured(self) -> bool:
        """Whether any step was measured."""
        return self.sums[0] > 0

    def add(self, level: float, seconds: float) -> None:
        """Note one step that could train `level` experts per layer (the mean over the layers)."""
        seconds = max(seconds, _SHORTEST_S)
        new = (1.0, level, seconds, level * level, level * seconds)
        self.sums = [DECAY * old + term for old, term in zip(self.sums, new, strict=True)]

    def expect(self, level: float) -> float:
        """Seconds of a step at this level. Raises ValueError if nothing was measured yet."""
        if not self.measured:
            raise ValueError("no step was measured yet")
        weight, x, t, xx, xt = self.sums
        x, t = x / weight, t / weight
        trust = TRUST * x * x
        slope = (xt - weight * x * t + trust * VARIABLE_SHARE * t / x) / (xx - weight * x * x + trust)
        return t + min(max(slope, 0.0), t / x) * (level - x)


@dataclass
class Pace:
    """Decides the steps of one round.

    Args:
        times: of earlier steps; every completed step is added.
        deadline_s: seconds from `begin`.
        steps: the configured number.
        most: per layer, experts that a step trains without a deadline.
        least: per layer, the fewest experts that a step may train.
        clock: in seconds.
    """

    times: StepTimes
    deadline_s: float
    steps: int
    most: list[int]
    least: list[int]
    clock: Clock = time.perf_counter
    levels: list[float] = field(default_factory=list, init=False)
    """Experts per layer (mean over the layers) that each step so far could train."""
    _began: float = field(default=0.0, init=False)
    _step_began: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """The round's training begins now."""
        self._began = self.clock()

    def next(self) -> list[int] | None:
        """Experts per layer that the next step may train; None: no further step. Its time starts now."""
        self._step_began = self.clock()
        chosen = self._choose(self.deadline_s - (self._step_began - self._began))
        if chosen is not None:
            self.levels.append(_mean(chosen))
        return chosen

    def done(self) -> None:
        """The step is complete."""
        self.times.add(self.levels[-1], self.clock() - self._step_began)

    def give_up(self) -> float | None:
        """To call after a forward pass: its seconds if the step is given up, which are remembered; None: go on."""
        taken = self.clock() - self._step_began
        lowest = self.levels[-1] <= _mean(self.least)
        if len(self.levels) > 1 or lowest or taken <= PATIENCE * self.deadline_s:
            return None
        self.times.add(self.levels[-1], 2 * taken)  # a backward pass takes at least as long as its forward pass
        return taken

    @property
    def mean_level(self) -> float | None:
        """Experts per layer that a step of this round could train (mean over the steps); None before the first."""
        return _mean(self.levels) if self.levels else None

    def _choose(self, remaining: float) -> list[int] | None:
        done = len(self.levels)
        if done == self.steps:
            return None
        if not self.times.measured:
            return self.most
        fitting = int(remaining / self.times.expect(_mean(self.least)) + _ROUNDING)
        if fitting < 1:
            return None if done else self.least
        steps = min(fitting, self.steps - done)
        for level in range(max(self.most), min(self.least), -1):
            allowed = [max(least, min(most, level)) for least, most in zip(self.least, self.most, strict=True)]
            if steps * self.times.expect(_mean(allowed)) <= remaining + _ROUNDING:
                return allowed
        return self.least


def _mean(numbers: list[int] | list[float]) -> float:
    return sum(numbers) / len(numbers)
