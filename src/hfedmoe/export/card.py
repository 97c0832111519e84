"""The model card of an export: README.md with the Hub's front matter.

Everything in it comes from the run folder; unknown facts are left out.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hfedmoe.config import MethodConfig, RunConfig
from hfedmoe.export.classifying import Classifier
from hfedmoe.export.provenance import data_name, hub_data_set, is_local, origin
from hfedmoe.export.snippet import Loading, loading_code, prompt_words
from hfedmoe.method.copies import Copies
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Method
from hfedmoe.runs.checkpoints import Checkpoint
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.settings import versions_here

BASE = "base"
"""Folder of an adapter's base model, if that was made for the run."""
FIGURES = {"accuracy": "accuracy", "accuracy_norm": "acc_norm", "macro_f1": "macro-F1", "loss": "loss"}
"""Figure of an evaluation -> its name in a card."""


@dataclass
class Export:
    """The export that the card describes."""

    form: str
    """"merged", "adapter" or "client"."""
    dtype: str
    base: str | None = None
    """Of an adapter: its base model, as a hub id or a path, relative to the adapter's folder."""
    model_type: str = ""
    whole_type: str | None = None
    """Of a multimodal base: the type of the whole model."""
    num_experts: list[int] = field(default_factory=list)
    encoder_decoder: bool = False
    client: int | None = None
    kept: list[list[int]] = field(default_factory=list)
    """Of a client's sub-model: for each layer, its experts by their numbers in the whole model."""
    scores_round: int | None = None
    tuned_steps: int = 0
    """Steps that the client trained it further for itself, after the last round."""
    prediction_layers: int = 0
    """Layers for multi-token prediction that the base's config declares; the export does not have them."""
    classifier: Classifier | None = None
    """Of a task with labels: how the model says each."""
    choices: bool = False
    """Whether the task is multiple choice."""


def card(run: RunFolder, checkpoint: Checkpoint, export: Export) -> str:
    """The content of README.md."""
    lines = run.read_rounds()
    parts = [
        _front_matter(run.config, export),
        _opening(run.config, checkpoint, export),
        _loading(run.config, export),
        _experts(export),
        _data(run.config, lines),
        _method(run.config),
        _clients(run.config, lines, export),
        _results(lines, checkpoint, export),
        _versions(run),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(config: RunConfig, export: Export) -> str:
    from huggingface_hub import ModelCardData

    base, licence = origin(config.model)
    relation = "adapter" if export.form == "adapter" and export.base != BASE else "finetune"
    data = ModelCardData(
        base_model=base,
        **licence,
        library_name="peft" if export.form == "adapter" else "transformers",
        pipeline_tag=None if export.encoder_decoder else "text-generation",
        datasets=hub_data_set(config.data),
        tags=["hfedmoe", "moe", "federated-learning", *(["peft", "lora"] if export.form == "adapter" else [])],
        base_model_relation=None if base is None else relation,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _opening(config: RunConfig, checkpoint: Checkpoint, export: Export) -> str:
    what = {
        "merged": "The fine-tuned model as a plain transformers checkpoint; the trained changes are in its weights.",
        "adapter": f"The trained parts of the model ({', '.join(_trained(config))}) as a PEFT adapter.",
        "client": f"The personal sub-model of client {export.client}, with only its most valuable experts, as a plain "
        "transformers checkpoint."
        + (f" The client trained it {export.tuned_steps} steps further for itself." if export.tuned_steps else ""),
    }[export.form]
    model = config.model
    name = Path(model.name).name if is_local(model) else model.name
    made = f"`{name}`"
    if model.revision is not None:
        made += f" at revision `{model.revision}`"
    if model.upcycle is not None:
        made += f", a dense model upcycled to {model.upcycle.experts} experts per layer, top-{model.upcycle.top_k}"
    layers = f"{len(export.num_experts)} MoE layers, {sum(export.num_experts)} experts in all"
    method, row = config.method, METHODS[config.method.name]
    paper = _paper(row)
    if method.name != "hfedmoe":
        how = f"with the method `{method.name}`" + (f" ([paper]({paper}))" if paper else "")
    elif method.score == "ib" and method.residency == "budget":
        how = f"with HFedMoE ([paper]({paper}))"
    else:
        how = f"(expert score `{method.score}`, residency `{method.residency}`)"
    text = [
        f"# {config.name}\n",
        f"{what} A federation of {config.clients.count} clients fine-tuned it {how}; this is round "
        f"{checkpoint.round}.\n",
        f"* Base model: {made} ({export.model_type}; {layers}).",
        f"* Precision of these files: {export.dtype}.",
    ]
    if export.whole_type is not None:
        text.append(f"* The base is a {export.whole_type} model; this is only its text model.")
    if export.prediction_layers:
        text.append(
            f"* The base's config lists {export.prediction_layers} layer(s) for multi-token prediction. They were not "
            "trained and are not in these files; the config here does not list them."
        )
    if model.expert_dtype != "same":
        text.append(
            f"* In training, the clients held the frozen experts as {model.expert_dtype}. Here, the trained changes "
            f"belong to the experts of the base model in {model.dtype}."
        )
    if export.base == BASE:
        text.append(f"* The base model was made for this run and is not on the hub: it is in the folder `{BASE}`.")
    if export.form == "adapter" and (export.base == BASE or is_local(model)):
        where = "`adapter_config.json`" + ("" if export.base == BASE else " and the code below")
        text.append(f"* The path of the base in {where} is from the machine that made these files.")
    return "\n".join(text) + "\n"


def _loading(config: RunConfig, export: Export) -> str:
    files = Loading(export.dtype, export.encoder_decoder, export.base, export.base == BASE, export.classifier)
    text = f"## How to load it\n\n```python\n{loading_code(config, files)}\n```\n"
    if export.classifier is not None:
        text += (
            "\nFor the rows of a file: `hfedmoe predict . FILE`. `hfedmoe.json` tells it the labels and the prompt.\n"
        )
    elif export.choices:
        text += (
            "\nFor the rows of a file, each with choices of its own: `hfedmoe predict . FILE` names the most probable "
            "choice. `hfedmoe.json` tells it the columns and the prompt.\n"
        )
    return text


def _experts(export: Export) -> str:
    if not export.kept:
        return ""
    rows = [
        f"| {layer} | {len(kept)} of {export.num_experts[layer]} | {', '.join(map(str, kept))} |"
        for layer, kept in enumerate(export.kept)
    ]
    return (
        "## Experts\n\nFor each MoE layer: the experts that the client held in its last round (round "
        f"{export.scores_round}), then those most important to it, by their numbers in the whole model. "
        "`experts.json` has the same for programs.\n\n| layer | kept | which |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _last_rows(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Client -> its record in the last round that it completed."""
    return {row["client"]: row for line in lines for row in line["clients"] if row.get("status") == "ok"}


def _data(config: RunConfig, lines: list[dict[str, Any]]) -> str:
    data, split = config.data, config.partition
    rows = {number: row["examples"] for number, row in _last_rows(lines).items()}
    how = ""
    if data.clients is None:
        kinds = "labels" if split.column is None else f"values of the column `{split.column}`"
        detail = {
            "dirichlet": f"Dirichlet {split.alpha:g} over the {kinds}",
            "shards": f"{split.shards_per_client} shards of sorted {kinds} each",
            "natural": f"by the column `{split.column}`",
            "iid": "at random",
        }.get(split.scheme, split.scheme)
        how = f"* Split over the clients: {detail}, seed {config.seed}.\n"
    text = f"## Data\n\n* Source: {data_name(data)}.\n"
    if data.source == "reuters-r8" and data.clients is None:
        text += (
            "* These articles are from Reuters-21578, Distribution 1.0 (<https://archive.ics.uci.edu/dataset/137>).\n"
        )
    if rows:
        text += f"* Training rows: {sum(rows.values())}, of {len(rows)} clients.\n"
    tested = next((line["evaluation"]["all"]["examples"] for line in lines if "all" in line["evaluation"]), None)
    if tested is not None:
        text += f"* Held-out rows: {tested}.\n"
    return text + how + f"* Prompt: {prompt_words(data)}.\n"


def _trained(config: RunConfig) -> list[str]:
    """The trained parts of the model, in words."""
    train, how = config.train, METHODS[config.method.name].trained_experts(config.train.experts)
    size = f"LoRA of rank {train.rank}, alpha {train.alpha:g}"
    experts = {"lora": [f"{size}, on every expert"], "full": ["whole experts"], "frozen": []}[how]
    attention = [f"{size}, on the attention projections"] if train.attention else []
    return [*experts, *attention, *(["routers"] if train.router else [])]


def _paper(row: Method) -> str | None:
    """The address of the paper that a method is from; None: it is from none, or only compared with there."""
    where, _, number = row.source.partition(" ")
    return f"https://arxiv.org/abs/{number}" if where == "arXiv" else None


class _Reads:
    """Section [method] that remembers which of its settings were read."""

    def __init__(self, settings: MethodConfig) -> None:
        self.settings, self.names = settings, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.settings, name)


def _read_by(row: Method, settings: MethodConfig) -> set[str]:
    """The settings of [method] that a method reads; found by asking it, because a row does not list them."""
    one, held = torch.ones(2), torch.ones(2, dtype=torch.bool)
    copies = Copies(1, usage=one, importance=one, tokens=one, held=held, trained=held, federation=one, size=one)
    reads = _Reads(settings)
    score = row.score(reads)
    for ask in (row.expert_weight, row.gate_weight, row.gate_rows):
        ask(copies, reads)
    names = reads.names & {"score", "tau", "expert_weight", "gate"}
    if score is not None:
        names |= {"level", "bootstrap", "bootstrap_batches"}
    if "score" in names:
        names |= {"lam", "beta"}
    return names if row.unlimited else names | {"residency"}


def _method_rows(config: RunConfig) -> dict[str, str]:
    """The method in its own words, its numbers, and the settings that it reads."""
    method, row = config.method, METHODS[config.method.name]
    own = _read_by(row, method)
    score = row.score(method)
    values = {
        "lam": f"{method.lam:g}",
        "beta": f"{method.beta:g}",
        "tau": f"{method.tau:g}",
        "residency": method.residency,
        "expert weight": method.expert_weight,
        "gate rule": method.gate,
    }
    setting_of = {"expert weight": "expert_weight", "gate rule": "gate"}
    words = {
        "method": f"`{method.name}`",
        "a client holds": row.holds,
        "a client trains": row.trains,
        "a client sends": row.travels,
        "the server": row.server,
    }
    if method.residency == "all" and not row.unlimited:
        words["a client holds"] = "everything"
    if row.status in ("secondary", "abstract"):
        words["implemented from"] = {"secondary": "descriptions by others", "abstract": "its abstract"}[row.status]
    return {
        **words,
        **({} if score is None else {"expert score": score}),
        **{name: value for name, value in values.items() if setting_of.get(name, name) in own},
        **{option.about: f"{option.of(method):g}" for option in row.options},
    }


def _method(config: RunConfig) -> str:
    train = config.train
    pairs = {
        "factors": "A and B averaged one by one",
        "freeze_a": "A frozen, B averaged",
        "exact": "products B A averaged",
    }
    row = METHODS[config.method.name]
    lora = "exact" if row.exact_lora(train.lora) else train.lora
    settings = {
        **_method_rows(config),
        "trained": "; ".join(_trained(config)),
        **({"LoRA pairs": pairs[lora]} if train.attention or row.trained_experts(train.experts) == "lora" else {}),
        "per client and round": f"{train.steps} steps of batch {train.batch_size}, AdamW, learning rate {train.lr:g}",
        "rounds": f"{config.federation.rounds} planned",
        **_unusual(config),
    }
    return "## Method\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in settings.items()) + "\n"


SAID = {
    "method": {"name", "options", "score", "lam", "beta", "tau", "residency", "expert_weight", "gate"},
    "train": {"experts", "rank", "alpha", "lora", "router", "attention", "steps", "batch_size", "lr"},
    "clients": {"count", "budgets"},
    "federation": {"rounds"},
}
"""Settings that a card shows elsewhere."""


def _unusual(config: RunConfig) -> dict[str, str]:
    """The other settings that affect results and are not the defaults."""
    found = {}
    unread = {"level", "bootstrap", "bootstrap_batches"} - _read_by(METHODS[config.method.name], config.method)
    for name, said in SAID.items():
        section, usual = getattr(config, name).model_dump(), getattr(RunConfig(), name).model_dump()
        for key, value in section.items():
            if key not in said and not (name == "method" and key in unread) and value != usual[key]:
                found[f"`{name}.{key}`"] = "none" if value is None else str(value)
    return found


def _clients(config: RunConfig, lines: list[dict[str, Any]], export: Export) -> str:
    last = _last_rows(lines)
    if not last:
        return ""
    total, budgets = sum(export.num_experts), config.clients.budgets
    method = METHODS[config.method.name]
    limited = not method.ignores_budgets(config.method) or method.limits_otherwise
    rows = [
        f"| {number}{' (this one)' if number == export.client else ''} | "
        + (f"{budgets[number % len(budgets)]} | " if limited else "")
        + f"{row['resident']} of {total} | {row['examples']} |"
        for number, row in sorted(last.items())
    ]
    first, column, line = ("Budgets, and what", " budget |", "---|") if limited else ("What", "", "")
    head = (
        f"{first} each client held and trained on in its last round.\n\n"
        f"| client |{column} experts held | rows |\n|---|{line}---|---|\n"
    )
    return f"## Clients\n\n{head}" + "\n".join(rows) + "\n"


def _results(lines: list[dict[str, Any]], checkpoint: Checkpoint, export: Export) -> str:
    wanted = [
        (0, "before"),
        (checkpoint.round, f"round {checkpoint.round}"),
        (lines[-1]["round"] if lines else 0, "end"),
    ]
    by_round = {line["round"]: line["evaluation"] for line in lines}
    measured: dict[tuple[int, str], tuple[str, dict[str, Any]]] = {}
    for number, label in wanted:
        for kind, which in (("all", "all held-out rows"), ("watch", "watched rows")):
            scores = by_round.get(number, {}).get(kind)
            if scores is not None:
                measured.setdefault((number, kind), (f"{label} | {which} ({scores['examples']})", scores))
    if not measured:
        return ""
    # Normed accuracy exists only if whole choices were compared, and not in runs of earlier versions.
    figures = [f for f in FIGURES if any(scores.get(f) is not None for _, scores in measured.values())]
    rows = [" | ".join([first, *(_figure(f, scores.get(f)) for f in figures)]) for first, scores in measured.values()]
    names = [FIGURES[f] for f in figures]
    note = "These are results of the whole shared model, not of this sub-model.\n\n" if export.form == "client" else ""
    head = f"| | measured on | {' | '.join(names)} |\n|{'---|' * (2 + len(names))}\n"
    return f"## Results\n\n{note}{head}" + "\n".join(f"| {row} |" for row in rows) + "\n"


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return {"macro_f1": f"{value:.3f}", "loss": f"{value:.4g}"}.get(name, f"{100 * value:.1f} %")


def _versions(run: RunFolder) -> str:
    written = tomllib.loads((run.path / "config.toml").read_text(encoding="utf-8")).get("versions", {})
    here = versions_here()
    text = "## Versions\n\nTrained with " + ", ".join(f"{name} {version}" for name, version in written.items()) + "."
    if here != written:
        text += "\nExported with " + ", ".join(f"{name} {version}" for name, version in here.items()) + "."
    return text + "\n"
