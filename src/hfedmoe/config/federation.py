"""Sections `federation` and `evaluation`."""

from typing import Annotated, Literal

from pydantic import Field

from hfedmoe.config.section import Section


class FederationConfig(Section):
    """Rounds, sampling and what happens when clients are missing or slow."""

    rounds: Annotated[int, Field(ge=1, description="number of rounds")] = 5
    clients_per_round: Annotated[int | None, Field(ge=1, description="clients drawn for a round; None: all")] = None
    min_clients: Annotated[
        int, Field(ge=1, description="a round needs so many clients and valid updates; fewer stop the run")
    ] = 1
    mode: Annotated[
        Literal["rounds", "async"],
        Field(
            description="`rounds`: the model changes when the clients of a round have answered; `async`: after every "
            "`buffer` updates, and who has answered goes on with the newest model"
        ),
    ] = "rounds"
    buffer: Annotated[
        int | None,
        Field(ge=1, description="updates that change the model in mode async; None: half as many as clients"),
    ] = None
    spare_clients: Annotated[
        int,
        Field(ge=0, description="clients drawn beyond clients_per_round; a round goes on without the slowest ones"),
    ] = 0
    round_s: Annotated[
        float | None,
        Field(
            gt=0,
            description="seconds of training after which a round goes on with the updates that are there, if they are "
            "min_clients; None: it waits as long as timeout_s",
        ),
    ] = None
    late: Annotated[
        Literal["drop", "fold"],
        Field(description="an update that comes after its round: drop it, or fold it into a later round"),
    ] = "drop"
    staleness: Annotated[
        float,
        Field(ge=0, description="the change of an update that comes s rounds late counts (1 + s)^-staleness"),
    ] = 0.5
    max_staleness: Annotated[
        int,
        Field(
            ge=1,
            description="updates that come more rounds late are dropped; the server keeps the trained tensors of as "
            "many rounds while it waits for them",
        ),
    ] = 8
    max_weight: Annotated[
        float,
        Field(
            ge=1,
            description="limit on a client's weight in averaging, as a multiple of the median client's rows",
        ),
    ] = 100.0
    timeout_s: Annotated[float, Field(gt=0, description="seconds for one request; a slower client is late")] = 3600.0
    connect_timeout_s: Annotated[
        float,
        Field(gt=0, description="seconds to wait for all clients at the start, and for min_clients before a round"),
    ] = 300.0

    @property
    def outlives(self) -> bool:
        """Whether training may outlive its round."""
        return self.mode == "async" or self.spare_clients > 0 or self.round_s is not None or self.late == "fold"


class EvaluationConfig(Section):
    """When and how the global model is measured."""

    every: Annotated[
        int, Field(ge=0, description="rounds between evaluations on all held-out rows; 0: only at start and end")
    ] = 0
    watch_rows: Annotated[
        int,
        Field(
            ge=0,
            description="held-out rows measured after every round, not used for the final figures; 50 or more decide "
            "which checkpoint is best; at most a fifth of the held-out rows if these are few; 0: none",
        ),
    ] = 64
    own_share: Annotated[
        float,
        Field(
            ge=0,
            le=0.25,
            description="share of each client's rows that it keeps back: never trained on, they measure what it gained "
            "(docs/gains.md); ten or more, of clients with forty or more, in runs of up to 100 clients; 0: none",
        ),
    ] = 0.1
    own_rows: Annotated[int, Field(ge=10, description="most rows that a client keeps back")] = 50
    personal_every: Annotated[
        int,
        Field(
            ge=0,
            description="rounds between two measurements by the clients of a round, on the rows that each keeps back, "
            "of the shared model and of the experts that it holds (docs/gains.md); 0: none",
        ),
    ] = 0
    alone: Annotated[
        bool,
        Field(
            description="after the run, also train every client by itself, with its own rows and budget and as many "
            "steps, to measure what the federation is worth to it; takes about as long as the run"
        ),
    ] = False
    tune_steps: Annotated[
        int,
        Field(
            ge=0,
            description="steps that every client goes on training the experts that it holds after the last round, for "
            "itself: they stay with it, and the table of sites says what that gains (docs/gains.md); 0: none",
        ),
    ] = 0
    batch_size: Annotated[int, Field(ge=1, description="rows per forward pass")] = 32
    scoring: Annotated[
        Literal["auto", "first_token", "loglikelihood"],
        Field(
            description="compare choices by first token, or whole (as lm-evaluation-harness does); auto: first token "
            "in classification if the labels differ in it, else whole"
        ),
    ] = "auto"

    @property
    def clients_measure(self) -> bool:
        """Whether clients measure their models on the rows that they keep back."""
        return bool(self.tune_steps or self.personal_every)
