"""What a person sees: the plain lines word for word, the screen by what is on it."""

import io
import logging
import os
import pty
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant, Personal, Silent, Watcher
from hfedmoe.report.live import Live, human_bytes, human_seconds
from hfedmoe.report.live.lines import Lines
from hfedmoe.report.live.screen import OnScreen
from hfedmoe.report.personal import personal_cards, personal_line

CLIENTS = [Participant("client 0", 210, 14, 0.25), Participant("client 1", 90, 56, 1.0)]
MIB = 2**20
OK = ClientRound(
    resident=14,
    trained=12,
    total_experts=56,
    bytes_down=3 * MIB,
    bytes_up=MIB,
    last_loss=1.5,
    mean_loss=1.7,
    seconds=4.0,
    peak_bytes=700 * MIB,
)
LATE = ClientRound(status="late", reason="no reply after 30 s")
OWN = [
    Personal(client=number, name=f"client {number}", own_rows=20, accuracy=accuracy, loss=loss)
    for number, accuracy, loss in ((0, 0.401, 2.5), (3, 0.77, 1.0), (7, 0.12, 4.0))
]
FINAL = [
    ClientTotals("client 0", 2, 14, 12, 56, 2**30, 700 * MIB, 6 * MIB, 2 * MIB, 8.0),
    ClientTotals("client [1]", 2, 56, 50, 56, None, None, 2**33, 2**33, 4000.0),
]


class Clock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def script(live: Watcher, clock: Clock) -> None:
    """Two rounds, with a late client."""
    live.start("r8-hfedmoe", num_rounds=5, first_round=1, clients=CLIENTS)
    live.phase("loading the model")
    live.evaluating(32, 400)
    live.evaluated(Evaluation(0, 0.218, 0.1, 2.0, 400))
    live.round_started(1)
    live.client_started(1, 0, 2)
    live.step(0, 1, 2, 1.9)
    clock.now += 61
    live.step(0, 2, 2, 1.5)
    live.client_done(1, 0, OK)
    live.client_started(1, 1, 2)
    live.client_done(1, 1, LATE)
    live.evaluated(Evaluation(1, 0.5, 0.4, 1.4, 64, "watch"))
    live.personal(1, OWN)
    live.round_done(1, 61.0, 3 * 2**20, 2**20)
    live.warning("round 1 was short: 1 of 2 clients [late]")
    live.round_started(2)
    live.client_started(2, 0, 2)
    live.step(0, 1, 2, 1.234)


def end(live: Watcher) -> None:
    live.evaluated(Evaluation(5, 0.831, None, None, 400))
    live.finish("done: runs/2026-11-22-r8-hfedmoe")
    live.final_table(FINAL, Evaluation(0, 0.218, 0.1, 2.0, 400), Evaluation(5, 0.831, 0.8, 0.5, 400))


PLAIN = """\
r8-hfedmoe: rounds 1 to 5, 2 clients
  client 0: 210 examples, budget 14 (25 %) experts
  client 1: 90 examples, budget 56 (100 %) experts
loading the model
  after round 0: accuracy 21.8 %, macro-F1 0.100, loss 2.000 (400 held-out rows)
round 1/5
  client 0: step 2/2, loss 1.700
  client 0: held 14/56 experts, trained 12, received 3.0 MiB, sent 1.0 MiB, loss 1.700, 4.0 s, \
peak 700.0 MiB (predicted)
  client 1: late: no reply after 30 s
  after round 1: accuracy 50.0 % (95 %: 38 to 62 %), macro-F1 0.400, loss 1.400 (64 watched rows)
  after round 1: clients' own rows: worst 12.0, median 40.1, best 77.0 %
round 1/5 done in 1:01: 3.0 MiB down, 1.0 MiB up, about 4:04 left
warning: round 1 was short: 1 of 2 clients [late]
round 2/5
  after round 5: accuracy 83.1 % (400 held-out rows)
done: runs/2026-11-22-r8-hfedmoe
"""


def test_plain_lines_word_for_word():
    out, clock = io.StringIO(), Clock()
    with Live(Console(file=out), clock) as live:
        assert isinstance(live, Lines)
        script(live, clock)
        end(live)
    text = out.getvalue()
    assert text.startswith(PLAIN)
    assert "\x1b" not in text
    assert "\r" not in text
    table = text.removeprefix(PLAIN)
    assert "before (round 0): accuracy 21.8 %, macro-F1 0.100, loss 2.000 (400 rows)\n" in table
    assert "after  (round 5): accuracy 83.1 %, macro-F1 0.800, loss 0.500 (400 rows)\n" in table
    for word in ("client [1]", "14/56", "1.0 GiB", "8.0 GiB", "700.0 MiB", "1:06:40", "predicted"):
        assert word in table


def test_without_choices_the_largest_loss_is_the_worst():
    own = [replace(one, accuracy=None, shared_loss=3.25) for one in OWN]
    assert personal_line(own) == "clients' own rows: loss, worst 4.000, median 2.500, best 1.000"
    assert personal_cards(own)[0] == ("worst client", "4.000", "client 7; all experts: 3.250")
    # Between two clients the median is of neither.
    assert personal_cards(OWN[:2])[1] == ("median client", "58.6 %", "of 2")


PACE: dict[str, Any] = {
    "steps": 2,
    "steps_wanted": 3,
    "activation": 3.04,
    "activation_wanted": 8.0,
    "deadline_s": 4.0,
}


def test_plain_lines_say_what_a_deadline_cost_and_why_memory_was_short():
    out = io.StringIO()
    with Live(Console(file=out), Clock()) as live:
        live.start("x", 2, 1, CLIENTS)
        live.client_done(1, 0, replace(OK, **PACE))
        live.client_done(1, 1, ClientRound(status="out of memory", reason="with 16 experts; it holds 14 next round"))
        live.final_table([replace(FINAL[0], **PACE), FINAL[1]], None, None)
    lines = out.getvalue().splitlines()
    assert lines[3].endswith(
        "peak 700.0 MiB (predicted); 2 of 3 steps in 4.0 s (deadline 4 s), 3 of 8 experts per layer trained"
    )
    assert lines[4] == "  client 1: out of memory: with 16 experts; it holds 14 next round"
    columns = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines[6:]]
    assert [column[-3:] for column in columns if column[0].startswith("client")] == [
        ["deadline", "steps", "per layer"],
        ["4 s", "2/3", "3/8"],
        ["-", "-", "-"],
    ]


def test_the_screen_has_columns_for_deadlines_only_where_there_are_any():
    live = screen()
    live.start("x", 2, 1, CLIENTS)
    live.client_done(1, 0, OK)
    assert "per layer" not in drawn(live)
    live.client_done(1, 1, replace(OK, **PACE))
    shown = drawn(live)
    assert "per layer" in shown
    assert "2/3" in shown
    assert "3/8" in shown


def test_a_run_that_goes_on_says_from_where():
    out = io.StringIO()
    with Live(Console(file=out)) as live:
        live.start("x", 5, 3, CLIENTS, [Evaluation(0, 0.2, None, None, 9)])
    assert out.getvalue().startswith("x: rounds 3 to 5, 2 clients\n")


LATER, LARGER = Participant("client 2", 50, 14, 0.25), Participant("client 1", 95, 56, 1.0)


def comings_and_goings(live: Watcher) -> None:
    live.start("x", 5, 1, CLIENTS)
    live.round_started(1)
    live.client_done(1, 1, ClientRound(client=1, status="left", reason="is no longer connected"))
    live.left(1)
    live.joined(2, LATER, again=False)
    live.round_started(2)
    live.client_started(2, 2, 2)


def test_plain_lines_say_who_comes_and_goes_once():
    out = io.StringIO()
    with Live(Console(file=out), Clock()) as live:
        comings_and_goings(live)
        live.joined(1, LARGER, again=True)
        live.step(1, 1, 2, 0.5)
    assert out.getvalue().splitlines()[3:] == [
        "round 1/5",
        "client 1 left",
        "joined: client 2: 50 examples, budget 14 (25 %) experts",
        "round 2/5",
        "back: client 1: 95 examples, budget 56 (100 %) experts",
    ]


def test_the_screen_shows_who_left_until_it_is_back():
    live = screen()
    with live:
        comings_and_goings(live)
        rows = {" ".join(line.split()[:2]): line.split() for line in drawn(live).splitlines()}
        assert rows["client 1"][-1] == "left"
        assert rows["client 2"][-1] == "training"
        live.joined(1, LARGER, again=True)
        rows = {" ".join(line.split()[:2]): line.split() for line in drawn(live).splitlines()}
        assert (rows["client 1"][2], rows["client 1"][-1]) == ("95", "waiting")
    assert "no longer connected" not in written(live)


def test_characters_that_the_output_lacks_do_not_stop_the_run():
    raw = io.BytesIO()
    with Live(Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))) as live:
        live.warning("Zoë")
        live.final_table(FINAL, None, None)
    assert raw.getvalue().startswith(b"warning: Zo?\n")


def screen(width: int = 100, height: int = 40, clock: Clock | None = None) -> OnScreen:
    console = Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True, newline=""),
        width=width,
        height=height,
        force_terminal=True,
        record=True,
        _environ={"TERM": "xterm"},
    )
    live = Live(console, clock or Clock())
    assert isinstance(live, OnScreen)
    return live


def written(live: OnScreen) -> str:
    return live.console.file.buffer.getvalue().decode()


def drawn(live: OnScreen) -> str:
    with live.console.capture() as capture:
        live.console.print(live.draw())
    return "".join(part.split("m", 1)[-1] for part in capture.get().split("\x1b["))


def test_the_screen_shows_where_the_run_is():
    clock = Clock()
    live = screen(clock=clock)
    with live:
        live.start("r8-hfedmoe", 5, 1, CLIENTS)
        live.phase("loading the model")
        assert "loading the model" in drawn(live)
        script(live, clock)
        shown = drawn(live)
        for words in (
            "round 2/5",
            "4:04 left",
            "client 0",
            "step 1/2",
            "loss 1.234",
            "round 0 21.8 %",
            "watched rows: round 1 50.0 %, macro-F1 0.400",
            "clients' own rows: worst 12.0, median 40.1, best 77.0 %",
            "moved so far: 4.0 MiB",
            "14/56",
            "14 (25 %)",
            "3.0 MiB",
            "700.0 MiB",
            "training",
            "waiting",
        ):
            assert words in shown
        live.evaluating(32, 400)
        assert "32/400 rows" in drawn(live)
        end(live)
    text = live.console.export_text()
    assert "round 0 21.8 % → round 5 83.1 %" in text
    assert "round 1, client 1: late: no reply after 30 s" in text
    assert "warning: round 1 was short: 1 of 2 clients [late]" in text
    assert "done: runs/2026-11-22-r8-hfedmoe" in text
    assert "1:06:40" in text


def test_a_long_history_keeps_its_ends():
    live = screen()
    for round in range(6):
        live.evaluated(Evaluation(round, None, None, 2 - round / 10, 9))
    assert "held-out rows: round 0 loss 2.000 → … → round 4 loss 1.600 → round 5 loss 1.500" in drawn(live)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_the_screen_fits_any_terminal(width):
    live = screen(width, height=14)
    live.start("a run with a long name " * 5, 5, 1, [Participant(f"client {i}" * 9, 10, 5, 0.5) for i in range(50)])
    live.round_started(1)
    live.client_started(1, 30, 9)
    live.step(30, 1, 9, 0.5)
    for client in (29, 31):
        live.client_done(1, client, OK)
    lines = drawn(live).splitlines()
    assert len(lines) <= 14
    assert max(map(len, lines)) <= width
    assert "and 46 more" in lines[-1]
    assert any("trai" in line for line in lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_inside_restores_the_terminal(error):
    live, before = screen(), (sys.stdout, sys.stderr)

    def interrupted() -> None:
        with live:
            live.start("x", 5, 1, CLIENTS)
            assert sys.stderr is not before[1]
            raise error

    with pytest.raises(error):
        interrupted()
    assert (sys.stdout, sys.stderr) == before
    text = written(live)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor was hidden and is shown again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_log_messages_go_above_the_screen():
    logger, stream = logging.getLogger("hfedmoe.test_live"), sys.stderr
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        live = screen()
        with live:
            live.start("x", 5, 1, CLIENTS)
            logger.warning("careful")
            assert handler.stream is not stream
        assert handler.stream is stream
        assert "careful" in live.console.export_text()
    finally:
        logger.removeHandler(handler)


def test_the_screen_redraws_by_itself():
    live = screen()
    with live:
        live.start("named late", 5, 1, CLIENTS)
        time.sleep(0.5)
        assert "named late" in written(live)


def test_silent_takes_every_event(capfd):
    with Silent() as live:
        script(live, Clock())
        end(live)
    assert capfd.readouterr() == ("", "")


DEMO = """
from hfedmoe.report.live import Live
with Live() as live:
    live.start("x", 5, 1, [])
    live.warning("w")
"""


def environment(**more: str) -> dict[str, str]:
    dropped = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"}
    return {key: value for key, value in os.environ.items() if key not in dropped} | more


def on_a_terminal(**more: str) -> str:
    """The demo on a real pseudo-terminal."""
    parent, end_of_child = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", DEMO], stdout=end_of_child, env=environment(**more)):
        os.close(end_of_child)
        out = b""
        while True:
            try:
                data = os.read(parent, 4096)
            except OSError:  # Linux reports the end of a pseudo-terminal as an error
                break
            if not data:
                break
            out += data
    os.close(parent)
    return out.decode()


def test_a_pipe_gets_plain_lines_even_with_forced_colour():
    command = [sys.executable, "-c", DEMO]
    done = subprocess.run(command, capture_output=True, env=environment(FORCE_COLOR="1"), check=True)
    assert done.stdout == b"x: rounds 1 to 5, 0 clients\nwarning: w\n"


def test_a_simple_terminal_gets_plain_lines():
    assert on_a_terminal(TERM="dumb") == "x: rounds 1 to 5, 0 clients\r\nwarning: w\r\n"  # \r by the terminal


def test_no_color_removes_only_the_colour():
    assert "\x1b[33m" in on_a_terminal(TERM="xterm", PYTHONIOENCODING="utf-8")
    bare = on_a_terminal(TERM="xterm", NO_COLOR="1", PYTHONIOENCODING="utf-8")
    assert "\x1b[33m" not in bare
    assert "\x1b[?25h" in bare  # still a live screen


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text
