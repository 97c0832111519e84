"""Deadlines on a fake clock: which steps are done, and what they train."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe.device.pace import DECAY, Pace, StepTimes


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def half_a_second_per_expert(level: float) -> float:
    return 1 + 0.5 * level


def do_round(pace: Pace, cost: Callable[[float], float]) -> list[list[int]]:
    """The levels of all steps of a round."""
    clock, chosen = pace.clock, []
    assert isinstance(clock, FakeClock)
    pace.begin()
    while (allowed := pace.next()) is not None:
        chosen.append(allowed)
        clock.now += cost(pace.levels[-1])
        pace.done()
    return chosen


def pace(deadline_s: float, steps: int = 3, times: StepTimes | None = None, layers: int = 2) -> Pace:
    return Pace(StepTimes() if times is None else times, deadline_s, steps, [8] * layers, [2] * layers, FakeClock())


def measured(*levels: float) -> StepTimes:
    times = StepTimes()
    for level in levels:
        times.add(level, half_a_second_per_expert(level))
    return times


def test_nothing_is_lowered_when_there_is_time() -> None:
    assert do_round(pace(15.0), half_a_second_per_expert) == [[8, 8]] * 3


def test_the_first_round_begins_as_configured_and_is_decided_by_its_first_step() -> None:
    # After 5 s at level 8 half of a step is assumed to be proportional: 2.5 + 0.3125 level. Left: 7 s for 2 steps,
    # so level 3 (3.4375 s). It takes 2.5 s, and 4.5 s are left for the last one: at level 6 it takes 4 s.
    first = pace(12.0)
    chosen = do_round(first, half_a_second_per_expert)
    assert chosen[:2] == [[8, 8], [3, 3]]
    assert chosen[2] in ([6, 6], [7, 7])
    assert first.mean_level == pytest.approx((8 + 3 + chosen[2][0]) / 3)


def test_the_second_round_knows_the_first() -> None:
    times = measured(8, 2, 8, 2)
    # 3 steps in 9.1 s: level 4 takes 3 s
    assert do_round(pace(9.1, times=times), half_a_second_per_expert)[0] == [4, 4]


def test_fewer_steps_when_the_lowest_level_is_too_slow_and_what_is_left_over_goes_into_experts() -> None:
    assert do_round(pace(4.5, times=measured(8, 2, 8, 2)), half_a_second_per_expert) == [[2, 2], [2, 2]]
    chosen = do_round(pace(5.2, times=measured(8, 2, 8, 2)), half_a_second_per_expert)
    assert chosen == [[3, 3], [3, 3]]


def test_there_is_always_one_step_and_it_is_the_cheapest() -> None:
    assert do_round(pace(0.5, times=measured(8, 2)), half_a_second_per_expert) == [[2, 2]]
    assert do_round(pace(0.5), half_a_second_per_expert) == [[8, 8]]  # nothing was measured yet


def test_layers_keep_their_own_limits() -> None:
    uneven = Pace(measured(8, 2, 8, 2), 2.76, 1, [8, 4], [2, 1], FakeClock())
    assert do_round(uneven, half_a_second_per_expert) == [[3, 3]]
    uneven = Pace(measured(8, 2, 8, 2), 3.3, 1, [8, 4], [2, 1], FakeClock())
    assert do_round(uneven, half_a_second_per_expert) == [[5, 4]]


def test_the_line_by_hand() -> None:
    times = StepTimes()
    with pytest.raises(ValueError, match="no step"):
        times.expect(3)
    times.add(8, 5.0)
    assert times.expect(8) == pytest.approx(5.0)
    assert times.expect(4) == pytest.approx(3.75)  # half of it is assumed to be proportional
    times.add(2, 2.0)
    weight = DECAY + 1
    x, t = (DECAY * 8 + 2) / weight, (DECAY * 5 + 2) / weight
    along = DECAY * (8 - x) * (5 - t) + (2 - x) * (2 - t)
    across = DECAY * (8 - x) ** 2 + (2 - x) ** 2
    slope = (along + 0.01 * x * x * 0.5 * t / x) / (across + 0.01 * x * x)
    assert times.expect(5) == pytest.approx(t + slope * (5 - x), rel=1e-12)
    assert times.expect(5) == pytest.approx(3.5, rel=0.01)


def test_a_line_never_falls_and_never_starts_below_zero() -> None:
    falling, steep = StepTimes(), StepTimes()
    for _ in range(3):
        falling.add(8, 1.0)
        falling.add(2, 3.0)
        steep.add(8, 8.0)
        steep.add(4, 0.1)
    assert falling.expect(2) == pytest.approx(falling.expect(8))
    assert steep.expect(0.0) == pytest.approx(0.0, abs=1e-9)


def test_a_clock_that_stands_still_is_no_division_by_zero() -> None:
    assert do_round(pace(2.0), lambda level: 0.0) == [[8, 8]] * 3


def test_a_faster_device_is_believed_after_some_steps() -> None:
    times = measured(8, 8, 8)
    for _ in range(40):
        times.add(8, 1.0)
    assert times.expect(8) == pytest.approx(1.0, rel=0.03)


def test_a_hopeless_first_step_is_given_up_and_remembered_unless_it_is_the_cheapest() -> None:
    slow = pace(2.0)
    slow.begin()
    assert slow.next() == [8, 8]
    slow.clock.now += 6.0  # type: ignore[attr-defined]
    assert slow.give_up() is None
    slow.clock.now += 0.5  # type: ignore[attr-defined]
    assert slow.give_up() == 6.5
    assert slow.times.expect(8) == pytest.approx(13.0)
    again = pace(2.0, times=slow.times)
    again.begin()
    assert again.next() == [2, 2]
    again.clock.now += 100  # type: ignore[attr-defined]
    assert again.give_up() is None


def test_a_later_step_is_never_given_up() -> None:
    steady = pace(2.0, times=measured(8, 2))
    steady.times.sums = StepTimes().sums
    steady.times.add(8, 0.1)
    steady.begin()
    steady.next()
    steady.done()
    assert steady.next() == [8, 8]
    steady.clock.now += 100  # type: ignore[attr-defined]
    assert steady.give_up() is None


@given(
    deadline=st.floats(0.1, 60),
    steps=st.integers(1, 6),
    fixed=st.floats(0.01, 5),
    slope=st.floats(0, 2),
    noise=st.lists(st.floats(0.5, 2), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_no_step_but_the_first_is_started_that_is_expected_to_be_late(
    deadline: float, steps: int, fixed: float, slope: float, noise: list[float]
) -> None:
    times = StepTimes()
    for round in range(3):
        one = pace(deadline, steps, times)
        clock = one.clock
        assert isinstance(clock, FakeClock)
        one.begin()
        while (allowed := one.next()) is not None:
            level = one.levels[-1]
            assert [2, 2] <= allowed <= [8, 8]
            if len(one.levels) > 1:
                assert times.expect(level) <= deadline - (clock.now - 1000) + 1e-6
            clock.now += (fixed + slope * level) * noise[(round + len(one.levels)) % len(noise)]
            one.done()
        assert 1 <= len(one.levels) <= steps
