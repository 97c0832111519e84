"""Who may take part."""

from pathlib import Path

import pytest

from hfedmoe.errors import UserError
from hfedmoe.fleet.keys import as_flower_has_it, new_key, private_key, public_of
from hfedmoe.fleet.roster import Roster


def public() -> str:
    return public_of(private_key(new_key(), "test"))


def test_numbers_are_the_lowest_that_are_free_and_devices_are_found_by_key(tmp_path: Path) -> None:
    keys = {name: public() for name in ("north", "south", "east")}
    roster = Roster().with_device("north", keys["north"], 50).with_device("south", keys["south"], None)
    assert [(device.name, device.number) for device in roster.devices] == [("north", 0), ("south", 1)]
    changed = roster.without("north").with_device("east", keys["east"], 7)
    assert [(device.name, device.number) for device in changed.devices] == [("east", 0), ("south", 1)]
    assert changed.count == 2
    assert roster.without("north").count == 2  # number 1 still needs a place
    changed.write(tmp_path / "roster.json")
    assert Roster.read(tmp_path / "roster.json") == changed
    found = changed.by_key()
    assert found[as_flower_has_it(keys["east"])].max_examples == 7
    assert as_flower_has_it(keys["north"]) not in found


def test_names_and_keys_are_used_once() -> None:
    key = public()
    roster = Roster().with_device("north", key, None)
    with pytest.raises(UserError, match=r"north is invited already; `hfedmoe remove north`"):
        roster.with_device("north", public(), None)
    with pytest.raises(UserError, match=r"this key is north's"):
        roster.with_device("south", key, None)
    with pytest.raises(UserError, match=r"this key was removed from the fleet"):
        roster.without("north").with_device("south", key, None)
    with pytest.raises(UserError, match=r"south is not invited; invited: north"):
        roster.without("south")


@pytest.mark.parametrize("name", ["", "../north", ".hidden", "a b", "x" * 41, "nord\n"])
def test_a_name_is_safe_as_the_name_of_a_file(name: str) -> None:
    with pytest.raises(UserError, match="a name is up to 40 letters"):
        Roster().with_device(name, public(), None)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "devices": [{"name": "x"}]}'])
def test_a_damaged_roster_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "roster.json").write_text(text)
    with pytest.raises(UserError, match=r"roster.json: not a roster"):
        Roster.read(tmp_path / "roster.json")
