"""Events are passed on."""

import inspect

from hfedmoe.events import EVENTS, Forwarding, Watcher


class Heard(Watcher):
    """Writes down the names of the events and what they said."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[object, ...]]] = []


def _hear(name: str) -> None:
    setattr(Heard, name, lambda self, *said: self.events.append((name, said)))


for _name in EVENTS:
    _hear(_name)


def test_every_event_is_passed_on() -> None:
    heard = Heard()
    forwarding = Forwarding(heard)
    expected: list[tuple[str, tuple[object, ...]]] = []
    for name in EVENTS:
        said = tuple(range(len(inspect.signature(getattr(Watcher, name)).parameters) - 1))
        getattr(forwarding, name)(*said)
        expected.append((name, said))
    assert heard.events == expected
    assert {"note", "site_gains", "final_table", "step"} <= set(EVENTS)


def test_a_subclass_treats_one_otherwise() -> None:
    class Louder(Forwarding):
        def warning(self, text: str) -> None:
            super().warning(text.upper())

    heard = Heard()
    Louder(heard).warning("careful")
    Louder(heard).note("well")
    assert heard.events == [("warning", ("CAREFUL",)), ("note", ("well",))]
