"""Section `carrier`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfedmoe.config.section import Section


class CarrierConfig(Section):
    """Where the simulated clients of `hfedmoe run` work: one after the other in its process, or several at once."""

    kind: Annotated[
        Literal["process", "ray"],
        Field(
            description='`process`, or `ray`: in workers of Ray, which needs `pip install "hfedmoe[ray]"`; both give '
            "the same weights"
        ),
    ] = "process"
    clients_at_once: Annotated[
        int | None,
        Field(
            ge=1,
            description="workers, each with a model of its own in memory; None: as many as there are CPUs and GPUs "
            "for; never more than clients in a round",
        ),
    ] = None
    cpus_per_client: Annotated[
        float,
        Field(gt=0, description="CPUs of a worker, and its threads if `threads` is None; may be a fraction"),
    ] = 1.0
    gpus_per_client: Annotated[
        float, Field(ge=0, description="GPUs of a worker, or its share of one; 0: clients work on CPUs")
    ] = 0.0
    address: Annotated[
        str | None,
        Field(
            description="a Ray cluster that is running: `HOST:PORT`, `ray://HOST:PORT` or `auto`; None: start Ray on "
            "this machine, for this run"
        ),
    ] = None
    start_timeout_s: Annotated[
        float, Field(gt=0, description="seconds for a worker to start and to load the model; a slower one is given up")
    ] = 1800.0

    @model_validator(mode="after")
    def _only_ray_has_workers(self) -> "CarrierConfig":
        for name, field in type(self).model_fields.items():
            if self.kind == "process" and getattr(self, name) != field.default:
                raise ValueError(f'{name} is about the workers of Ray; set carrier.kind = "ray", or leave it out')
        return self
