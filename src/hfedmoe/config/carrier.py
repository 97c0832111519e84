"""Section `carrier`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfedmoe.config.section import Section


class CarrierConfig(Section):
    """Where simulated clients work: one after the other in this process, or many at once in workers of Ray."""

    kind: Annotated[
        Literal["process", "ray"],
        Field(description='`process`, or `ray`, which needs `pip install "hfedmoe[ray]"`; both give the same weights'),
    ] = "process"
    clients_at_once: Annotated[
        int | None,
        Field(
            ge=1,
            description="workers, each with a model of its own; None: as many as there are CPUs and GPUs for, at most "
            "one for every client of a round",
        ),
    ] = None
    cpus_per_client: Annotated[
        float,
        Field(gt=0, description="CPUs of a worker, and its threads where `threads` is None; may be a fraction"),
    ] = 1.0
    gpus_per_client: Annotated[
        float, Field(ge=0, description="GPUs of a worker, or its share of one; 0: workers use no GPU")
    ] = 0.0
    address: Annotated[
        str | None,
        Field(
            description="a running Ray cluster: `HOST:PORT`, `ray://HOST:PORT` or `auto`; None: start Ray on this "
            "machine, for this run"
        ),
    ] = None

    @model_validator(mode="after")
    def _only_ray_has_workers(self) -> "CarrierConfig":
        for name, field in type(self).model_fields.items():
            if self.kind == "process" and getattr(self, name) != field.default:
                raise ValueError(f'{name} is about the workers of Ray; set carrier.kind = "ray", or leave it out')
        return self
