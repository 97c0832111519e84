"""What a device found out about itself and a run: lines for its owner, codes and counts for the server."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from hfedmoe.files.received import received
from hfedmoe.wire.trouble import CODES, SETTINGS

PATH = "/v1/hfedmoe/report"
SERVER, VERSIONS, RUN, MODEL, ROWS, TOKENIZER, BUDGET = (
    "server",
    "versions",
    "run",
    "model",
    "rows",
    "tokenizer",
    "budget",
)
ABOUT = (SERVER, VERSIONS, RUN, MODEL, ROWS, TOKENIZER, BUDGET)
MOST_BYTES, MOST_COUNT = 1 << 14, 10**9


@dataclass(frozen=True)
class Finding:
    """One line of a check."""

    fits: bool
    about: str
    """One of `ABOUT`."""
    text: str = ""
    """For the owner of the device only."""
    count: int = 0
    """Rows that can be read, or experts that fit."""
    of: int = 0
    """All experts of the model."""
    code: str = ""
    """One of `wire.trouble.CODES` if something does not fit."""

    @property
    def line(self) -> str:
        """As it is shown on the device."""
        return f"{'ok' if self.fits else 'FAILS':6}{self.text}"


@dataclass(frozen=True)
class Report:
    """The findings of one device about a run, without their texts."""

    run: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[str]:
        """What does not fit, in words, each said once."""
        said = (CODES[one.code].format(count=one.count) for one in self.findings if not one.fits)
        return list(dict.fromkeys(said))

    def about(self, what: str) -> Finding | None:
        """The finding about one of `ABOUT`."""
        return next((one for one in self.findings if one.about == what), None)

    def to_json(self) -> str:
        """As JSON text; the texts of the findings are left out."""
        findings = [{k: v for k, v in asdict(one).items() if k != "text"} for one in self.findings]
        return json.dumps({"run": self.run, "findings": findings})

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`. The text comes from a device; raises ValueError if it is not valid."""
        tree: Any = received(text)
        if not isinstance(tree, dict) or not isinstance(tree.get("run"), str) or len(tree["run"]) > 64:
            raise ValueError("not a report")
        findings = tree.get("findings")
        if not isinstance(findings, list) or not 0 < len(findings) <= len(ABOUT):
            raise ValueError("not a report")
        return cls(tree["run"], tuple(map(_finding, findings)))


def _finding(tree: Any) -> Finding:
    if not isinstance(tree, dict) or set(tree) != {"fits", "about", "count", "of", "code"}:
        raise ValueError("not a finding")
    if tree["about"] not in ABOUT or not isinstance(tree["fits"], bool):
        raise ValueError("not a finding")
    for key in ("count", "of"):
        value = tree[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_COUNT:
            raise ValueError("not a finding")
    if (not tree["fits"] or tree["code"] != "") and tree["code"] not in CODES:
        raise ValueError("not a finding")
    return Finding(**tree)


def failing(about: str, text: str, code: str = SETTINGS) -> Finding:
    """Something does not fit."""
    return Finding(False, about, text, code=code)
