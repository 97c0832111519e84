"""What a server tells its devices about the run, before anything is trained."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hfedmoe import __version__
from hfedmoe.config import TrackingConfig
from hfedmoe.files.received import received

if TYPE_CHECKING:
    from hfedmoe.data.terms import Terms
    from hfedmoe.prepare import Prepared

PATH = "/v1/hfedmoe/offer"
VERSION_HEADER = "hfedmoe-version"
TO_RUN, TO_CHECK = "run", "check"


def versions() -> str:
    """The versions that server and devices must share."""
    return f"hfedmoe {__version__}, flwr {version('flwr')}"


@dataclass(frozen=True)
class Offer:
    """A run that devices may join."""

    versions: str
    run: str
    """A key of the run: the same after the server was started again."""
    config: str
    """As TOML."""
    terms: str
    """The task (`data.terms.Terms`), as JSON."""
    base: str
    """Digest of the base model (`models.digest.base_digest`)."""
    tokenizer: str
    """Digest of the tokenizer."""
    purpose: str = TO_RUN
    """What it is for: TO_RUN, or TO_CHECK: devices say whether they fit, and nothing is trained."""

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Offer":
        """The inverse of `to_json`. The text comes from a server; raises ValueError if it is not valid."""
        tree: Any = received(text)
        if not isinstance(tree, dict) or set(tree) != set(cls.__dataclass_fields__):
            raise ValueError("not an offer")
        if not all(isinstance(value, str) for value in tree.values()):
            raise ValueError("not an offer")
        return cls(**tree)


def offer_of(prepared: "Prepared", terms: "Terms", run: str, purpose: str = TO_RUN) -> Offer:
    """The offer of a run that is ready. Raises UserError if the model's files cannot be read."""
    from hfedmoe.models.digest import base_digest, tokenizer_digest
    from hfedmoe.runs.settings import run_config_toml

    config = prepared.config
    # Where the server sends its figures is no device's business.
    shown = config.model_copy(update={"tracking": TrackingConfig()})
    tokenizer = tokenizer_digest(prepared.encoder.tokenizer)
    return Offer(
        versions(), run, run_config_toml(shown).decode(), terms.to_json(), base_digest(config), tokenizer, purpose
    )
