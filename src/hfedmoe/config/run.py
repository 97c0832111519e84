"""The whole configuration of a run."""

from typing import Annotated

from pydantic import Field, model_validator

from hfedmoe.config.carrier import CarrierConfig
from hfedmoe.config.clients import ClientsConfig
from hfedmoe.config.data import DataConfig, PartitionConfig
from hfedmoe.config.federation import EvaluationConfig, FederationConfig
from hfedmoe.config.method import MethodConfig, TrainConfig
from hfedmoe.config.model import ModelConfig
from hfedmoe.config.section import Section
from hfedmoe.config.tracking import TrackingConfig


class RunConfig(Section):
    """Everything about one run."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9._-]+$",
            description="name of the run; its folder is runs/<date>-<name>; letters, digits, . _ -",
        ),
    ] = "r8-hfedmoe"
    seed: Annotated[int, Field(ge=0, lt=2**31, description="seed of the split, all random draws and new weights")] = 0
    threads: Annotated[int | None, Field(ge=1, description="CPU threads; None: torch decides")] = None
    keep_checkpoints: Annotated[int, Field(ge=1, description="latest checkpoints kept, besides the best")] = 2
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    partition: PartitionConfig = Field(default_factory=PartitionConfig)
    clients: ClientsConfig = Field(default_factory=ClientsConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    carrier: CarrierConfig = Field(default_factory=CarrierConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _parts_agree(self) -> "RunConfig":
        if self.data.clients is not None and len(self.data.clients) != self.clients.count:
            raise ValueError(
                f"data.clients names {len(self.data.clients)} files but clients.count is {self.clients.count}"
            )
        if self.method.expert_weight == "all" and self.train.lora == "exact":
            raise ValueError(
                'method.expert_weight = "all" counts copies that were not sent, which train.lora = "exact" cannot; '
                'set train.lora = "factors"'
            )
        if self.method.name != MethodConfig.model_fields["name"].default:  # that one trains anything
            from hfedmoe.method.methods import METHODS  # imports torch

            problem = METHODS[self.method.name].problem_with(self.train.experts, self.train.lora)
            if problem is not None:
                raise ValueError(f'method.name = "{self.method.name}": {problem}')
            if self.evaluation.alone and METHODS[self.method.name].changes_model:
                raise ValueError(
                    f'evaluation.alone: a client of the method "{self.method.name}" trains parts that no other method '
                    "has; use `hfedmoe compare --methods` with local"
                )
            for setting in ("tune_steps", "personal_every"):
                if getattr(self.evaluation, setting) and (words := METHODS[self.method.name].no_own_model):
                    raise ValueError(f'evaluation.{setting}: method.name = "{self.method.name}": {words}; leave it out')
        if self.evaluation.personal_every and not self.evaluation.own_share:
            raise ValueError(
                "evaluation.personal_every: clients measure on rows that they keep back; set evaluation.own_share, or "
                "leave it out"
            )
        if self.evaluation.personal_every and self.federation.outlives:
            raise ValueError(
                "evaluation.personal_every: clients may still train when a round ends (federation.mode, spare_clients, "
                "round_s, late); leave it out"
            )
        device, gpus = self.model.device, self.carrier.gpus_per_client
        if self.carrier.kind == "ray" and device.startswith("cuda") and (device != "cuda" or not gpus):
            raise ValueError(
                f'model.device = "{device}": Ray gives GPUs to its workers; set carrier.gpus_per_client, and '
                'model.device = "auto" or "cuda"'
            )
        sampled = self.federation.clients_per_round or self.clients.count
        if sampled > self.clients.count:
            raise ValueError(f"federation.clients_per_round={sampled} is more than clients.count={self.clients.count}")
        if self.federation.min_clients > sampled:
            raise ValueError(
                f"federation.min_clients={self.federation.min_clients} is more than the {sampled} clients of a round"
            )
        _agree_about_time(self.federation, sampled, self.clients.count)
        return self


def _agree_about_time(settings: FederationConfig, sampled: int, count: int) -> None:
    """Raise ValueError if settings about slow clients contradict each other."""
    if settings.mode == "async":
        for name in ("spare_clients", "round_s", "late"):
            if getattr(settings, name) != FederationConfig.model_fields[name].default:
                raise ValueError(
                    f"federation.{name} is about rounds, which mode async does not have: it never waits for the "
                    "slowest; leave it out"
                )
        if settings.buffer is not None and settings.buffer < settings.min_clients:
            raise ValueError(f"federation.buffer={settings.buffer} is less than min_clients={settings.min_clients}")
        return
    if settings.buffer is not None:
        raise ValueError('federation.buffer is about mode async; set federation.mode = "async", or leave it out')
    if settings.spare_clients and sampled + settings.spare_clients > count:
        raise ValueError(
            f"federation.clients_per_round={sampled} and spare_clients={settings.spare_clients} are more than "
            f"clients.count={count}"
        )
