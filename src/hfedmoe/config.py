"""The configuration of a run: one validated tree, read from TOML, overridable with `--set section.key=value`.

Every field documents itself; `hfedmoe run --show-config` prints the tree. Importing this module is cheap: it
must not import torch, transformers or flwr.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hfedmoe.device.budgets import Budget, check_budget, is_count
from hfedmoe.errors import UserError


class Section(BaseModel):
    """A part of the tree. Unknown keys are errors: a misspelt setting must not be silently ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)


class UpcycleConfig(Section):
    """Turn a dense model into a MoE before training: every feed-forward block is copied into experts."""

    experts: Annotated[int, Field(ge=2, description="experts per layer")] = 8
    top_k: Annotated[int, Field(ge=1, description="experts per token")] = 2
    router_std: Annotated[float, Field(gt=0, description="standard deviation of the fresh router rows")] = 0.02

    @model_validator(mode="after")
    def _top_k_fits(self) -> "UpcycleConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        return self


class ModelConfig(Section):
    """Which model, and in what precision."""

    name: Annotated[str, Field(description="`smollm2` (packaged), a hub id, or a local folder")] = "smollm2"
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub model")] = None
    upcycle: UpcycleConfig | None = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Field(description="of the frozen weights in memory")
    ] = "float32"
    compute: Annotated[
        Literal["auto", "float32", "same"],
        Field(
            description="precision of the arithmetic with 16-bit weights: float32, the same as `dtype`, or auto: "
            "float32 on processors without 16-bit products, and with float16 weights"
        ),
    ] = "auto"
    expert_dtype: Annotated[
        Literal["same", "float32", "bfloat16", "float16", "8bit", "4bit"],
        Field(
            description="how frozen experts are stored: as `dtype`, or smaller; 8bit and 4bit (NF4) need bitsandbytes"
        ),
    ] = "same"
    device: Annotated[str, Field(description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`")] = "auto"
    trust_remote_code: Annotated[bool, Field(description="run code shipped with the checkpoint")] = False

    @model_validator(mode="after")
    def _gradients_have_room(self) -> "ModelConfig":
        if self.dtype == "float16" and self.compute == "same":
            raise ValueError('compute="same": gradients vanish in float16; use compute="float32", or dtype="bfloat16"')
        return self


DataFormat = Literal[
    "auto",
    "classification",
    "choices",
    "completion",
    "ag-news",
    "20newsgroups",
    "reuters-r8",
    "reuters-r52",
    "piqa",
    "hellaswag",
    "mmlu",
    "arc-easy",
    "arc-challenge",
    "instructions",
]
"""What rows look like: by kind, or as in a data set with a name (`hfedmoe.data.known`)."""


class DataConfig(Section):
    """Which rows, and how they become prompts."""

    source: Annotated[
        str,
        Field(
            description="a data set by name (`reuters-r8` is packaged; docs/data.md lists them), a CSV/JSONL/Parquet "
            "file, or a hub id"
        ),
    ] = "reuters-r8"
    test: Annotated[str | None, Field(description="file or split with held-out rows; None: hold out `test_share`")] = (
        None
    )
    test_share: Annotated[
        float, Field(gt=0, lt=1, description="of the rows, where nothing else says what to hold out")
    ] = 0.1
    clients: Annotated[
        list[str] | None, Field(description="one file per client; replaces `source` and the partition")
    ] = None
    subset: Annotated[str | None, Field(description="configuration name of a hub data set")] = None
    revision: Annotated[str | None, Field(description="branch, tag or commit of a hub data set")] = None
    split: Annotated[
        str | None, Field(description="training split of a hub data set; None: `train`, or the named data set's own")
    ] = None
    format: Annotated[
        DataFormat,
        Field(
            description="rows of text/label, prompt/choices/answer, or prompt/completion; or rows as in a data set "
            "with a name; auto: by the source's name or by the columns"
        ),
    ] = "auto"
    text: Annotated[str, Field(description="column with the text or prompt")] = "text"
    label: Annotated[str, Field(description="column with the label (classification)")] = "label"
    choices: Annotated[str, Field(description="column with the list of choices")] = "choices"
    answer: Annotated[str, Field(description="column with the right choice: its index or its text")] = "answer"
    answers: Annotated[
        Literal["auto", "index", "text"],
        Field(
            description="what that column holds: numbers from 0 or letters from A, or texts of choices; auto: what all "
            "its rows can be"
        ),
    ] = "auto"
    completion: Annotated[str, Field(description="column with the completion")] = "completion"
    label_words: Annotated[dict[str, str] | None, Field(description="what the model says for each label")] = None
    template: Annotated[
        str | None,
        Field(
            description="prompt; {text} is the text column, cut to fit; None: the named data set's own; "
            'else for labels `"News: {text}\\nTopic:"`, for choices `"Question: {text}\\nAnswer:"`, for completions '
            '`"{text}"`'
        ),
    ] = None
    chat: Annotated[
        Literal["template", "plain"],
        Field(description="how conversations are written: the tokenizer's chat template, or `User: ...` lines"),
    ] = "template"
    max_tokens: Annotated[
        int,
        Field(
            ge=4,
            description="longest prompt and longest answer in tokens; the text is cut, the rest of the template kept",
        ),
    ] = 64
    train_rows: Annotated[int | None, Field(ge=1, description="use at most so many training rows")] = None
    test_rows: Annotated[int | None, Field(ge=1, description="use at most so many held-out rows")] = 400

    @field_validator("template")
    @classmethod
    def _has_text(cls, value: str | None) -> str | None:
        if value is not None and value.count("{text}") != 1:
            raise ValueError("must contain {text} exactly once")
        return value


class PartitionConfig(Section):
    """How one data set is split over the clients."""

    scheme: Annotated[
        Literal["dirichlet", "iid", "shards", "natural"],
        Field(description="label mixes drawn per client, alike, by label in shards, or by a column"),
    ] = "dirichlet"
    alpha: Annotated[float, Field(gt=0, description="Dirichlet concentration: small is skewed")] = 0.3
    shards_per_client: Annotated[int, Field(ge=1, description="shards of sorted labels per client (shards)")] = 2
    column: Annotated[str | None, Field(description="column that names the client (natural)")] = None
    min_rows: Annotated[int, Field(ge=1, description="every client gets at least so many rows")] = 16


class ClientsConfig(Section):
    """How many clients there are and what each of them can hold."""

    count: Annotated[int, Field(ge=1, description="number of clients")] = 8
    budgets: Annotated[
        list[Budget],
        Field(
            min_length=1,
            description="per client, repeated in turn: experts over all layers (`96`), a share of them (`25%`), memory "
            "(`4GiB`), a device by name (`jetson-orin-nano-8gb`; `hfedmoe plan --presets`), or `auto`: this machine",
        ),
    ] = ["25%", "50%", "100%"]
    deadlines_s: Annotated[
        list[float] | None,
        Field(
            min_length=1,
            description="per client, repeated in turn: seconds of training per round; the client does fewer steps or "
            "trains fewer experts per batch to keep it; None: no deadline",
        ),
    ] = None
    activation: Annotated[
        Budget | None,
        Field(description="experts per layer that a batch may train: a number or a share; None: all resident"),
    ] = None
    off_budget: Annotated[
        Literal["frozen", "skip"],
        Field(description="resident experts over the activation budget: forward only, or not"),
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
                raise ValueError(f"{seconds:g}: a deadline is more than 0 and at most 1e9 seconds")
        return value

    @field_validator("activation")
    @classmethod
    def _activation_parses(cls, value: Budget | None) -> Budget | None:
        if value is not None and not is_count(value):
            raise ValueError(f'"{value}": expected a share such as "25%" or a whole number of experts')
        return value


class MethodConfig(Section):
    """The method: four choices and their constants (docs/method.md)."""

    score: Annotated[
        Literal["ib", "importance", "frequency", "random", "activation", "taylor"],
        Field(description="what an expert is worth to a client"),
    ] = "ib"
    lam: Annotated[float, Field(ge=0, le=1, description="eq. 5: cumulative against specific importance")] = 0.5
    beta: Annotated[float, Field(description="eq. 14: weight of redundancy")] = 0.5
    tau: Annotated[float, Field(ge=0, description="eq. 17: usage threshold as a multiple of 1/E")] = 0.1
    level: Annotated[Literal["sample", "token"], Field(description="what x_i is")] = "sample"
    residency: Annotated[Literal["budget", "all"], Field(description="`all`: every client holds every expert")] = (
        "budget"
    )
    expert_weight: Annotated[Literal["samples", "tokens", "importance"], Field(description="w_c(e) of eq. 17")] = (
        "samples"
    )
    gate: Annotated[Literal["importance", "rows", "fedavg"], Field(description="rule for the gates, eq. 21")] = (
        "importance"
    )
    bootstrap: Annotated[
        Literal["forward", "stream", "prior", "none"],
        Field(
            description="first scores: a forward pass over local data (a stream of experts from disk, within the "
            "budget, on devices that carve); the federation's usage so far; or none (random)"
        ),
    ] = "forward"
    bootstrap_batches: Annotated[int, Field(ge=1, description="batches of that forward pass")] = 2


class TrainConfig(Section):
    """What one client does in one round."""

    experts: Annotated[Literal["lora", "full", "frozen"], Field(description="what of the experts is trained")] = "lora"
    rank: Annotated[int, Field(ge=1, description="LoRA rank")] = 8
    alpha: Annotated[float, Field(gt=0, description="LoRA scale is alpha / rank")] = 16.0
    lora: Annotated[Literal["factors", "freeze_a", "exact"], Field(description="how LoRA pairs are averaged")] = (
        "factors"
    )
    router: Annotated[bool, Field(description="train the routers (gates)")] = True
    attention: Annotated[bool, Field(description="LoRA on the attention projections, averaged over all clients")] = (
        False
    )
    steps: Annotated[int, Field(ge=1, description="optimizer steps per client and round")] = 2
    batch_size: Annotated[int, Field(ge=1, description="rows per step")] = 8
    lr: Annotated[float, Field(gt=0, description="learning rate of AdamW")] = 2e-3
    lr_final_share: Annotated[
        float, Field(gt=0, le=1, description="lr falls evenly over the rounds to this share of itself; 1: constant")
    ] = 1.0
    weight_decay: Annotated[float, Field(ge=0, description="of AdamW")] = 0.0
    max_grad_norm: Annotated[
        float | None, Field(gt=0, description="gradients are scaled down to this norm; None: not")
    ] = 1.0
    loss: Annotated[
        Literal["vocabulary", "choices"],
        Field(description="compare the answer's first token with the whole vocabulary, or with the other choices only"),
    ] = "vocabulary"
    logit_adjustment: Annotated[
        float, Field(ge=0, description="strength of the correction for local label skew (choice tasks); 0: off")
    ] = 0.0
    gradient_checkpointing: Annotated[bool, Field(description="less memory for activations, more time")] = False


class FederationConfig(Section):
    """Rounds, sampling and what happens when clients are missing."""

    rounds: Annotated[int, Field(ge=1, description="number of rounds")] = 5
    clients_per_round: Annotated[int | None, Field(ge=1, description="clients drawn for a round; None: all")] = None
    min_clients: Annotated[int, Field(ge=1, description="fewer valid replies than this stop the run")] = 1
    timeout_s: Annotated[float, Field(gt=0, description="a client that needs longer for one request is late")] = 3600.0
    connect_timeout_s: Annotated[float, Field(gt=0, description="how long to wait for clients to connect")] = 300.0


class EvaluationConfig(Section):
    """When and how the global model is measured."""

    every: Annotated[int, Field(ge=0, description="rounds between evaluations on all held-out rows; 0: ends only")] = 0
    watch_rows: Annotated[int, Field(ge=0, description="held-out rows measured after every round; 0: none")] = 64
    batch_size: Annotated[int, Field(ge=1, description="rows per forward pass")] = 32
    scoring: Annotated[
        Literal["auto", "first_token", "loglikelihood"],
        Field(
            description="compare the choices by first token, or whole (as lm-evaluation-harness does); auto: first "
            "token in classification where it tells the labels apart, else whole"
        ),
    ] = "auto"


class RunConfig(Section):
    """Everything about one run."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9._-]+$", description="of the run folder: runs/<date>-<name>; letters, digits, . _ -"
        ),
    ] = "r8-hfedmoe"
    seed: Annotated[int, Field(ge=0, lt=2**31, description="of the split, every draw and every fresh weight")] = 0
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

    @model_validator(mode="after")
    def _parts_agree(self) -> "RunConfig":
        if self.data.clients is not None and len(self.data.clients) != self.clients.count:
            raise ValueError(
                f"data.clients names {len(self.data.clients)} files but clients.count is {self.clients.count}"
            )
        sampled = self.federation.clients_per_round or self.clients.count
        if sampled > self.clients.count:
            raise ValueError(f"federation.clients_per_round={sampled} is more than clients.count={self.clients.count}")
        if self.federation.min_clients > sampled:
            raise ValueError(
                f"federation.min_clients={self.federation.min_clients} is more than the {sampled} clients of a round"
            )
        return self


def load_config(path: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Read a TOML file (None: the defaults), apply `section.key=value` overrides and validate.

    The config.toml of a run folder can be read like any other: its `versions` are passed over.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown, or a value is of the wrong type or range.
    """
    if path is None:
        return config_from_text("", "config", overrides)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from None
    return config_from_text(text, f"config {path}", overrides)


def config_from_text(text: str, origin: str, overrides: list[str] | None = None) -> RunConfig:
    """As `load_config`, from the text of a TOML file that `origin` names in errors. Raises UserError."""
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin}: not valid TOML: {error}") from None
    tree.pop("versions", None)
    for override in overrides or []:
        _apply_override(tree, override)
    apply_unset(tree, origin)
    return config_from_tree(tree, origin)


def config_from_tree(tree: dict[str, Any], origin: str) -> RunConfig:
    """Validate a plain tree; `origin` names it in errors. Raises UserError."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_one_line(error)}") from None


def apply_unset(tree: dict[str, Any], origin: str) -> None:
    """Set the keys listed under `unset` to None, which TOML cannot say: `unset = ["data.test_rows"]`.

    Raises:
        UserError: an entry goes through something that is not a section.
    """
    unset = tree.pop("unset", [])
    for key in unset if isinstance(unset, list) else [unset]:
        *sections, last = str(key).split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{origin}: unset: {key}: {section} is not a section; remove the entry")
        node[last] = None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {override}: expected section.key=value, for example --set train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string, so that --set model.name=smollm2 needs no quotes
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
        node = child
    node[parts[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    # pydantic adds the tried member of a union ("int", "str") to the path: only real keys help the reader.
    where = ".".join(str(part) for part in first["loc"] if str(part) not in {"int", "float", "str", "constrained-str"})
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_suggestion(where)}"
    elif "input" in first and not isinstance(first["input"], dict | BaseModel):
        message = f"{message} (got {first['input']!r})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def _suggestion(where: str) -> str:
    """The nearest key of the same section, as a hint."""
    import difflib

    model: type[BaseModel] = RunConfig
    *sections, last = where.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        candidates = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return ""
        model = inner
    close = difflib.get_close_matches(last, list(model.model_fields), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(model.model_fields)}"
