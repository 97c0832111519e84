"""What the owner of a device allows. No server overrides it."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfedmoe.client.policy import ANYTHING, NAMES, Policy, PolicyError
from hfedmoe.config.budgets import AUTO, Budget
from hfedmoe.errors import UserError
from hfedmoe.wire.trouble import POLICY_MODEL

if TYPE_CHECKING:
    from hfedmoe.config import DataConfig, RunConfig
    from hfedmoe.data.decoding import Form
    from hfedmoe.data.terms import Terms


@dataclass(frozen=True)
class Allowed:
    """A device's own rows, model and limits."""

    data: Path
    budget: Budget = AUTO
    model: str | None = None
    """Of the device, instead of the one that the server names: a folder or hub id. None: only packaged models."""
    encoding: str | None = None
    delimiter: str | None = None
    policy: Policy = ANYTHING
    asked: Path | None = None
    """The file that counts the tasks that servers ask about; None: the server is not told whether the rows fit."""

    def to_json(self) -> dict[str, Any]:
        """As a tree for JSON."""
        return asdict(self) | {"data": str(self.data.expanduser().absolute())}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Allowed":
        """The inverse of `to_json`."""
        policy = dict(tree["policy"])
        for key in ("models", *NAMES):
            policy[key] = None if policy[key] is None else tuple(policy[key])
        return cls(**tree | {"data": Path(tree["data"]), "policy": Policy(**policy)})

    def node_config(self, number: int) -> dict[str, bool | int | float | str]:
        """As `hfedmoe.deployment` reads it; `number` is the client's."""
        found: dict[str, bool | int | float | str] = {
            "partition-id": number,
            "data": str(self.data.expanduser().absolute()),
            "budget": self.budget,
        }
        written = {"encoding": self.encoding, "delimiter": self.delimiter}
        limits = replace(self.policy, models=None).node_config()  # where the model is, `config_of` has found out
        return found | {key: value for key, value in written.items() if value is not None} | limits

    def check_task(self, config: "DataConfig", terms: "Terms") -> None:
        """Raise PolicyError if rows may not be read for a run's task, or servers have asked about too many."""
        from hfedmoe.data.terms import task_key
        from hfedmoe.fleet.asked import Asked

        self.policy.check_task(config, terms)
        if self.asked is not None:
            Asked(self.asked).note(task_key(config, terms))

    def form(self) -> "Form":
        """How the file of rows is written. Raises UserError if there is no such encoding."""
        from pydantic import ValidationError

        from hfedmoe.config import DataConfig
        from hfedmoe.data.decoding import OPTION, Form

        written = {"encoding": self.encoding, "delimiter": self.delimiter}
        try:
            said = DataConfig.model_validate({k: v for k, v in written.items() if v is not None})
            return Form.of(said, OPTION)
        except ValidationError as error:
            found = error.errors()[0]
            raise UserError(f"--{found['loc'][-1]}: {found['msg'].removeprefix('Value error, ')}") from None

    def config_of(self, text: str) -> "RunConfig":
        """The server's configuration with the device's own model.

        Raises:
            PolicyError: it asks for more than the policy allows, or for a model that is not in its folders.
            UserError: it is not valid, asks for too much, names a model that the device does not have, or wants to
                execute code that is shipped with one.
        """
        from hfedmoe.config import config_from_text
        from hfedmoe.models.names import PACKAGED_MODELS
        from hfedmoe.wire.requests import InvalidRequestError, check_settings

        config = config_from_text(text, "the server's configuration")
        try:
            check_settings(config)
        except InvalidRequestError as error:
            raise UserError(f"the server's configuration: {error}") from None
        model = config.model
        if model.trust_remote_code:
            raise UserError(f"the run wants to execute code that is shipped with {model.name}, which devices refuse")
        self.policy.check(config)
        if model.name in PACKAGED_MODELS:
            return config
        if self.model is None and self.policy.models is not None:
            model = model.model_copy(update={"name": self.policy.model(model.name), "revision": None})
        elif self.model is None:
            raise PolicyError(
                f"the run's model is {model.name}; say with --model where this device has it", POLICY_MODEL
            )
        else:
            path = Path(self.model).expanduser()
            local = {"name": str(path.absolute()), "revision": None} if path.exists() else {"name": self.model}
            model = model.model_copy(update=local)
        return config.model_copy(update={"model": model})
