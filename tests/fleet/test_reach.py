"""What a device says when its clock and the server's differ."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from hfedmoe.fleet import certificates, keys, reach
from hfedmoe.fleet.folder import opened
from hfedmoe.fleet.front import Board, front
from hfedmoe.fleet.invite import key_of, read_invitation
from hfedmoe.fleet.reach import ClockError, NoAnswerError, ask
from tests.fleet.places import HOST, new_fleet


def clock(seconds: float) -> Any:
    """The module datetime of a machine whose clock is ahead by some seconds."""

    class Datetime(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=seconds)

    class Module:
        datetime, UTC, timedelta = Datetime, datetime.UTC, datetime.timedelta

    return Module


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (86_400, "clock is 8640[0-9] s ahead of the server's; set the clock"),
        (10, "clock is (9|10|11) s ahead of the server's"),
        (-86_400, "clock is 8(6400|639[0-9]) s behind the server's"),
        (-60, "serves no run now"),  # Flower accepts it too
        (0, "serves no run now"),
    ],
)
def test_a_device_with_a_wrong_clock_is_told_so_and_may_come_again(
    seconds: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = new_fleet(tmp_path, "north")
    invitation = read_invitation(tmp_path / "north.invite")
    key = key_of(invitation, None)
    with front(Board(opened(tmp_path / "fleet")), HOST, port):
        monkeypatch.setattr(reach, "datetime", clock(seconds))
        monkeypatch.setattr(reach, "signed", lambda key: _signed(key, seconds))
        with pytest.raises(NoAnswerError, match=said) as caught:
            ask(invitation, key)
    assert isinstance(caught.value, ClockError) == ("clock" in said)


def _signed(key: Any, seconds: float) -> dict[str, str]:
    """The headers of a device whose clock is ahead; the server, in this process, keeps its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "datetime", clock(seconds))
        return keys.signed(key)


def test_a_certificate_that_is_not_valid_yet_means_that_the_clock_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "datetime", clock(30 * 86_400))
        port = new_fleet(tmp_path, "north")
    invitation = read_invitation(tmp_path / "north.invite")
    with (
        front(Board(opened(tmp_path / "fleet")), HOST, port),
        pytest.raises(ClockError, match=r"its certificate is not valid yet by this device's clock .* set the clock"),
    ):
        ask(invitation, key_of(invitation, None))
