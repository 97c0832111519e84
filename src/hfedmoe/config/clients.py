"""Section `clients`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from hfedmoe.config.budgets import Budget, check_budget, is_count
from hfedmoe.config.section import Section


class ClientsConfig(Section):
    """How many clients there are and what each of them can hold."""

    count: Annotated[int, Field(ge=1, description="number of clients")] = 8
    budgets: Annotated[
        list[Budget],
        Field(
            min_length=1,
            description="one per client, the list is repeated if it is too short: experts over all layers (`96`), a "
            "share of them (`25%`), memory (`4GiB`), a device by name (`jetson-orin-nano-8gb`; `hfedmoe plan "
            "--presets` lists them), or `auto`: the free memory of this machine",
        ),
    ] = ["25%", "50%", "100%"]  # noqa: RUF012 (pydantic copies it for every instance)
    deadlines_s: Annotated[
        list[float] | None,
        Field(
            min_length=1,
            description="one per client, the list is repeated if it is too short: seconds of training per round; the "
            "client does fewer steps or trains fewer experts per batch to keep it; None: no deadline",
        ),
    ] = None
    activation: Annotated[
        Budget | None,
        Field(description="experts per layer that a batch may train: a number or a share; None: all resident"),
    ] = None
    off_budget: Annotated[
        Literal["frozen", "skip"],
        Field(description="resident experts over the activation budget: used in the forward pass only, or not at all"),
    ] = "frozen"

    @field_validator("budgets")
    @classmethod
    def _budgets_parse(cls, value: list[Budget]) -> list[Budget]:
        for budget in value:
            check_budget(budget)
        return value

    @field_validator("deadlines_s")
    @classmethod
    def _deadlines_are_positive(cls, value: list[float] | None) -> list[float] | None:
        for seconds in value or []:
            if not 0 < seconds <= 1e9:
                raise ValueError(f"{seconds:g}: a deadline must be more than 0 and at most 1e9 seconds")
        return value

    @field_validator("activation")
    @classmethod
    def _activation_parses(cls, value: Budget | None) -> Budget | None:
        if value is not None and not is_count(value):
            raise ValueError(f'"{value}": expected a share such as "25%" or a whole number of experts')
        return value
