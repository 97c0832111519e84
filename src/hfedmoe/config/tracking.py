"""Section `tracking`."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from hfedmoe.config.section import Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingConfig(Section):
    """Trackers that also get the figures of every round (docs/tracking.md); the run folder has them in any case."""

    to: Annotated[
        list[TrackerName],
        Field(
            description="trackers, each with its own extra: `pip install 'hfedmoe[tensorboard]'`; none: nothing is sent"
        ),
    ] = Field(default_factory=list)
    project: Annotated[
        str,
        Field(
            pattern=r"^[^/\\#?%:]+$",
            max_length=100,
            description="project (W&B, trackio) or experiment (MLflow)",
        ),
    ] = "hfedmoe"
    run_name: Annotated[
        str | None,
        Field(min_length=1, max_length=100, description="name of the run there; None: the name of its folder"),
    ] = None
    group: Annotated[
        str | None,
        Field(min_length=1, max_length=100, description="name that several runs share, to be shown together"),
    ] = None
    tags: Annotated[list[str], Field(description="words by which runs are found (not in TensorBoard)")] = Field(
        default_factory=list
    )
    clients: Annotated[
        bool, Field(description="also send series of every client, by number, not only sums and means over clients")
    ] = False
    mlflow_uri: Annotated[
        str | None,
        Field(min_length=1, description="where MLflow writes: a server or a store; None: as MLflow decides"),
    ] = None
    timeout_s: Annotated[
        float,
        Field(
            gt=0, description="seconds that a tracker may take to answer; then the run goes on without it for a while"
        ),
    ] = 120.0

    @field_validator("to")
    @classmethod
    def _each_once(cls, to: list[TrackerName]) -> list[TrackerName]:
        return list(dict.fromkeys(to))

    @field_validator("tags")
    @classmethod
    def _short(cls, tags: list[str]) -> list[str]:
        if not all(1 <= len(tag) <= 64 for tag in tags):
            raise ValueError("a tag has 1 to 64 characters")
        return tags

    @model_validator(mode="after")  # not of the field: its value must not be in the message
    def _no_password(self) -> "TrackingConfig":
        if self.mlflow_uri is not None and "@" in urlsplit(self.mlflow_uri).netloc:
            raise ValueError(
                "mlflow_uri holds a user or a password; set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, in the environment instead"
            )
        return self
