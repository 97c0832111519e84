"""What the owner of a device lets a server ask of it. No server and no configuration of a run overrides it."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfedmoe.errors import UserError
from hfedmoe.wire.trouble import POLICY_BATCH, POLICY_EXPERTS, POLICY_MODEL, POLICY_STEPS, POLICY_TASK, POLICY_TUNE

if TYPE_CHECKING:
    from hfedmoe.config import DataConfig, RunConfig
    from hfedmoe.data.terms import Terms


NAMES = ("columns", "labels")
"""What an owner gives as names."""
SWITCHES = ("measure", "tune")
"""What an owner may turn off."""


class PolicyError(UserError):
    """A run asks for more than the device's owner allows; the text names the setting of the device.

    Args:
        code: one of `wire.trouble.CODES`, which is all that the server is told.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Policy:
    """Limits of a device; None: no limit. Fields are named as the options of `hfedmoe join`, with `_` for `-`."""

    max_experts: int | None = None
    """Most experts over all layers that it holds, also if its memory has room for more."""
    max_steps: int | None = None
    """Most local steps in a round."""
    max_seconds: float | None = None
    """Most seconds of training in a round: then it stops, with fewer steps or experts, as at a deadline."""
    min_batch: int | None = None
    """Fewest rows of a batch: an update from one row says more about it than one from many."""
    models: tuple[str, ...] | None = None
    """Folders in which it has models; None: any folder."""
    measure: bool = True
    """Whether it keeps rows back and says, in counts, how good models are on them (docs/gains.md)."""

    tune: bool = True
    """Whether it goes on training its experts for itself after the last round, where a run asks for it."""

    columns: tuple[str, ...] | None = None
    """The only columns of its file that a run may read; None: any."""
    labels: tuple[str, ...] | None = None
    """The labels that a run must have, no more and no fewer; None: any."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Policy":
        """From a node config, where `models` is one text with `:` between the folders, and names are as in `names_of`.

        Raises:
            UserError: a value is not a number, or not above 0; `measure` or `tune` is neither true nor false; or
                `columns` or `labels` has no name.
        """
        found: dict[str, Any] = {}
        for key in ("max_experts", "max_steps", "max_seconds", "min_batch"):
            value = settings.get(option := key.replace("_", "-"))
            if value is None:
                continue
            kinds = (int, float) if key == "max_seconds" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise UserError(f"this node's {option} = {value!r}: give a number above 0")
            found[key] = value
        if (folders := settings.get("models")) is not None:
            found["models"] = tuple(folder for folder in str(folders).split(":") if folder)
        for key in NAMES:
            if (text := settings.get(key)) is not None:
                found[key] = names_of(str(text), f"this node's {key}")
        for key in SWITCHES:
            if not isinstance(value := settings.get(key, True), bool):
                raise UserError(f"this node's {key} = {value!r}: give true or false")
            found[key] = value
        return cls(**found)

    def node_config(self) -> dict[str, bool | int | float | str]:
        """The inverse of `of`."""
        known = {key.replace("_", "-"): value for key, value in asdict(self).items() if value is not None}
        if self.models is not None:
            known["models"] = ":".join(self.models)
        for key in NAMES:
            if (names := getattr(self, key)) is not None:
                known[key] = names_text(names)
        return {key: value for key, value in known.items() if key not in SWITCHES or not value}

    def check(self, config: "RunConfig") -> None:
        """Raise PolicyError if a run's settings ask for more than is allowed."""
        train = config.train
        if self.max_steps is not None and train.steps > self.max_steps:
            raise PolicyError(
                f"the run asks for {train.steps} steps per round (train.steps); max-steps of this device is "
                f"{self.max_steps}",
                POLICY_STEPS,
            )
        if self.min_batch is not None and train.batch_size < self.min_batch:
            raise PolicyError(
                f"the run has batches of {train.batch_size} rows (train.batch_size); min-batch of this device is "
                f"{self.min_batch}",
                POLICY_BATCH,
            )

    def check_task(self, config: "DataConfig", terms: "Terms") -> None:
        """Raise PolicyError if a run reads other columns or has other labels than is allowed."""
        from hfedmoe.data.normal import normal
        from hfedmoe.data.terms import columns_of

        if self.columns is not None:
            others = sorted({normal(name) for name in columns_of(config, terms)} - set(self.columns))
            if others:
                raise PolicyError(
                    f"the run reads {names_text(others)} of a file (data.text, data.label and so on); columns of this "
                    f"device are {names_text(self.columns)}",
                    POLICY_TASK,
                )
        if self.labels is not None and {normal(label) for label in terms.labels} != set(self.labels):
            raise PolicyError(
                f"the run's labels are {names_text(terms.labels[:20]) or 'none'} (data.labels); labels of this device "
                f"are {names_text(self.labels)}",
                POLICY_TASK,
            )

    def check_tuning(self, steps: int) -> None:
        """Raise PolicyError if it may not take so many steps for itself after the last round."""
        if not self.tune:
            raise PolicyError("the run asks devices to train on for themselves; this device has tune off", POLICY_TUNE)
        if self.max_steps is not None and steps > self.max_steps:
            raise PolicyError(
                f"the run asks for {steps} steps after the last round (evaluation.tune_steps); max-steps of this "
                f"device is {self.max_steps}",
                POLICY_TUNE,
            )

    def check_rows(self, rows: int) -> None:
        """Raise PolicyError if the device has too few rows for a batch that is large enough."""
        if self.min_batch is not None and rows < self.min_batch:
            raise PolicyError(
                f"this device has {rows} rows, fewer than one batch; its min-batch is {self.min_batch}", POLICY_BATCH
            )

    def experts(self, held: int, needed: int) -> int:
        """The experts that a device holds, of `held` that it has room for.

        Args:
            needed: the fewest that the run's method can do with.

        Raises:
            PolicyError: fewer are allowed.
        """
        if self.max_experts is None:
            return held
        if self.max_experts < needed:
            raise PolicyError(
                f"the run needs {needed} experts on this device (method.name, model.name); its max-experts is "
                f"{self.max_experts}",
                POLICY_EXPERTS,
            )
        return min(held, self.max_experts)

    def model(self, name: str) -> str:
        """Where the device has the model that a run names.

        Raises:
            PolicyError: it is not packaged, and not in one of the folders.
        """
        from hfedmoe.models.names import PACKAGED_MODELS

        if self.models is None or name in PACKAGED_MODELS:
            return name
        own = Path(name.rstrip("/\\").replace("\\", "/")).name
        for folder in self.models:
            found = Path(folder).expanduser() / own
            # ".." and "" are no names of models; a folder of links may lead elsewhere: that is its owner's choice.
            if own not in ("", ".", "..") and found.is_dir():
                return str(found.absolute())
        raise PolicyError(
            f"the run's model is {name}, which is not in the folders of this device's models "
            f"({', '.join(self.models) or 'none'})",
            POLICY_MODEL,
        )

    def deadline(self, seconds: float | None) -> float | None:
        """Seconds of training in a round, of those that the run sets; None: no deadline."""
        known = [limit for limit in (seconds, self.max_seconds) if limit is not None]
        return min(known, default=None)


def names_of(text: str, what: str) -> tuple[str, ...]:
    """Names with commas between them, in their normal form; one that has a comma is in quotes, as in a CSV.

    Raises:
        UserError: there is none; it begins with `what`.
    """
    from hfedmoe.data.normal import normal

    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    names = tuple(name for row in rows for cell in row if (name := normal(cell)))
    if not names:
        raise UserError(f"{what} = {text!r}: give names, with commas between them")
    return names


def names_text(names: Sequence[str]) -> str:
    """The inverse of `names_of`."""
    written = io.StringIO()
    csv.writer(written, lineterminator="").writerow(names)
    return written.getvalue()


ANYTHING = Policy()
"""The policy of a device whose owner set no limits."""
