"""The model card of an export: README.md with the Hub's front matter.

Everything in it comes from the run folder; what is not known is left out.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfedmoe.config import DataConfig, ModelConfig, RunConfig
from hfedmoe.data.known import known_set
from hfedmoe.data.tasks import TEMPLATE
from hfedmoe.loading import PACKAGED
from hfedmoe.runs import Checkpoint, RunFolder
from hfedmoe.runs.settings import versions_here

PACKAGED_ORIGIN = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Hub id and licence of packaged models that have them."""
PAPER = "https://arxiv.org/abs/2601.00583"


@dataclass
class Export:
    """What the card is about."""

    form: str
    """"merged", "adapter" or "client"."""
    dtype: str
    base: str | None = None
    """Of an adapter: what to load it on, as seen from its folder."""
    model_type: str = ""
    num_experts: list[int] = field(default_factory=list)
    encoder_decoder: bool = False
    client: int | None = None
    kept: list[list[int]] = field(default_factory=list)
    """Of a client's sub-model: the experts of each layer, by their numbers in the whole model."""
    scores_round: int | None = None


def write_card(folder: Path, run: RunFolder, checkpoint: Checkpoint, export: Export) -> None:
    """Write README.md."""
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
    (folder / "README.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _front_matter(config: RunConfig, export: Export) -> str:
    from huggingface_hub import ModelCardData

    base, license_ = origin(config.model)
    relation = "adapter" if export.form == "adapter" and export.base != "base" else "finetune"
    data = ModelCardData(
        base_model=base,
        license=license_,
        library_name="peft" if export.form == "adapter" else "transformers",
        pipeline_tag=None if export.encoder_decoder else "text-generation",
        datasets=config.data.source if _on_hub(config) else None,
        tags=["hfedmoe", "moe", "federated-learning", *(["peft", "lora"] if export.form == "adapter" else [])],
        base_model_relation=None if base is None else relation,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def origin(model: ModelConfig) -> tuple[str | None, str | None]:
    """Hub id and licence of a run's base model, as far as they are known on this machine."""
    if model.name in PACKAGED:
        return PACKAGED_ORIGIN.get(model.name, (None, None))
    folder = Path(model.name).expanduser()
    if folder.exists():
        card = (folder if folder.is_dir() else folder.parent) / "README.md"
        known = _front_of(card)
        base = known.get("base_model")
        return (base if isinstance(base, str) else None), _text(known.get("license"))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.name, "README.md", revision=model.revision)
    return model.name, _text(_front_of(Path(cached)).get("license")) if isinstance(cached, str) else None


def _front_of(card: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    return dict(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _on_hub(config: RunConfig) -> bool:
    source = config.data.source
    return config.data.clients is None and source.count("/") == 1 and not Path(source).expanduser().exists()


def _opening(config: RunConfig, checkpoint: Checkpoint, export: Export) -> str:
    what = {
        "merged": "The fine-tuned model as a plain transformers checkpoint, with what was trained in its weights.",
        "adapter": "What was trained, experts and routers included, as a PEFT adapter.",
        "client": f"The personal sub-model of client {export.client}: the experts that are worth most to it, and no "
        "others, as a plain transformers checkpoint.",
    }[export.form]
    model = config.model
    name = Path(model.name).name if Path(model.name).expanduser().exists() else model.name
    made = f"`{name}`"
    if model.revision is not None:
        made += f" at revision `{model.revision}`"
    if model.upcycle is not None:
        made += f", a dense model upcycled to {model.upcycle.experts} experts per layer, top-{model.upcycle.top_k}"
    layers = f"{len(export.num_experts)} MoE layers, {sum(export.num_experts)} experts in all"
    text = [
        f"# {config.name}\n",
        f"{what} A federation of {config.clients.count} clients fine-tuned it with HFedMoE ([paper]({PAPER})); this is "
        f"round {checkpoint.round}.\n",
        f"* Base model: {made} ({export.model_type}; {layers}).",
        f"* Precision of these files: {export.dtype}.",
    ]
    if model.expert_dtype != "same":
        text.append(
            f"* The clients held the frozen experts as {model.expert_dtype}; what they trained belongs here to the "
            f"experts as the base model has them, in {model.dtype}."
        )
    if export.base == "base":
        text.append("* The base model was made for this run and is on no hub: it is in the folder `base`.")
    return "\n".join(text) + "\n"


def _loading(config: RunConfig, export: Export) -> str:
    auto = "AutoModelForSeq2SeqLM" if export.encoder_decoder else "AutoModelForCausalLM"
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    prompt = repr(_template(config.data).replace("{text}", "..."))
    code = []
    if export.form == "adapter":
        revision = f", revision={config.model.revision!r}" if config.model.revision and export.base != "base" else ""
        where = 'f"{folder}/base"' if export.base == "base" else repr(export.base)
        code += ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", ""]
        code += ['folder = "."  # where this file is']
        code += [f'base = {auto}.from_pretrained({where}{revision}, dtype="{config.model.dtype}"{trust})']
        code += ["model = PeftModel.from_pretrained(base, folder)"]
    else:
        code += [f"from transformers import {auto}, AutoTokenizer", "", 'folder = "."  # where this file is']
        code += [f'model = {auto}.from_pretrained(folder, dtype="{export.dtype}"{trust})']
    code += [f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"]
    code += [f'inputs = tokenizer({prompt}, return_tensors="pt", return_token_type_ids=False)']
    code += ["output = model.generate(**inputs, max_new_tokens=4)", "print(tokenizer.decode(output[0]))"]
    return "## How to load it\n\n```python\n" + "\n".join(code) + "\n```\n"


def _experts(export: Export) -> str:
    if not export.kept:
        return ""
    rows = [
        f"| {layer} | {len(kept)} of {export.num_experts[layer]} | {', '.join(map(str, kept))} |"
        for layer, kept in enumerate(export.kept)
    ]
    return (
        "## Experts\n\nPer MoE layer those that the client held in its last round (round "
        f"{export.scores_round}), then those with the highest importance to it, by their numbers in the whole model; "
        "`experts.json` says the same to programs.\n\n| layer | kept | which |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _last_rows(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What was written down of each client in the last round that it completed."""
    return {row["client"]: row for line in lines for row in line["clients"] if row.get("status") == "ok"}


def _data(config: RunConfig, lines: list[dict[str, Any]]) -> str:
    data, split = config.data, config.partition
    rows = {number: row["examples"] for number, row in _last_rows(lines).items()}
    if data.clients is not None:
        source, how = "a file per client: " + ", ".join(f"`{Path(file).name}`" for file in data.clients), ""
    else:
        name = data.source if _on_hub(config) or not Path(data.source).exists() else Path(data.source).name
        source = f"`{name}`" + (f", subset `{data.subset}`" if data.subset else "")
        detail = {
            "dirichlet": f"Dirichlet {split.alpha:g} over the labels",
            "shards": f"{split.shards_per_client} shards of sorted labels each",
            "natural": f"by the column `{split.column}`",
            "iid": "at random",
        }.get(split.scheme, split.scheme)
        how = f"* Split over the clients: {detail}, seed {config.seed}.\n"
    text = f"## Data\n\n* Source: {source}.\n"
    if data.source == "reuters-r8" and data.clients is None:
        text += (
            "* These articles are from Reuters-21578, Distribution 1.0 (<https://archive.ics.uci.edu/dataset/137>).\n"
        )
    if rows:
        text += f"* Training rows: {sum(rows.values())}, of {len(rows)} clients.\n"
    tested = next((line["evaluation"]["all"]["examples"] for line in lines if "all" in line["evaluation"]), None)
    if tested is not None:
        text += f"* Held-out rows: {tested}.\n"
    return text + how + f"* Prompt: `{_template(data)!r}`, at most {data.max_tokens} tokens.\n"


def _template(data: DataConfig) -> str:
    """The prompt's template: the config's, that of a data set with a name, or the default."""
    known = known_set(data)
    return data.template or (TEMPLATE if known is None else known.template)


def _method(config: RunConfig) -> str:
    method, train = config.method, config.train
    trained = {
        "lora": f"LoRA of rank {train.rank}, alpha {train.alpha:g}, on every expert (averaged by {train.lora})",
        "full": "whole experts",
        "frozen": "no experts",
    }[train.experts]
    more = [
        name for name, on in (("routers", train.router), ("LoRA on the attention projections", train.attention)) if on
    ]
    settings = {
        "expert score": method.score,
        "lam": f"{method.lam:g}",
        "beta": f"{method.beta:g}",
        "tau": f"{method.tau:g}",
        "residency": method.residency,
        "expert weight": method.expert_weight,
        "gate rule": method.gate,
        "trained": ", ".join([trained, *more]),
        "per client and round": f"{train.steps} steps of batch {train.batch_size}, AdamW, learning rate {train.lr:g}",
        "rounds": f"{config.federation.rounds} planned",
    }
    return "## Method\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in settings.items()) + "\n"


def _clients(config: RunConfig, lines: list[dict[str, Any]], export: Export) -> str:
    last = _last_rows(lines)
    if not last:
        return ""
    total, budgets = sum(export.num_experts), config.clients.budgets
    rows = [
        f"| {number}{' (this one)' if number == export.client else ''} | {budgets[number % len(budgets)]} | "
        f"{row['resident']} of {total} | {row['examples']} |"
        for number, row in sorted(last.items())
    ]
    return (
        "## Clients\n\nBudgets, and what each client held and trained on in its last round.\n\n"
        "| client | budget | experts held | rows |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _results(lines: list[dict[str, Any]], checkpoint: Checkpoint, export: Export) -> str:
    wanted = [
        (0, "before"),
        (checkpoint.round, f"round {checkpoint.round}"),
        (lines[-1]["round"] if lines else 0, "end"),
    ]
    by_round = {line["round"]: line["evaluation"] for line in lines}
    rows, seen = [], set()
    for number, label in wanted:
        for kind, which in (("all", "all held-out rows"), ("watch", "watched rows")):
            scores = by_round.get(number, {}).get(kind)
            if scores is None or (number, kind) in seen:
                continue
            seen.add((number, kind))
            accuracy = "" if scores["accuracy"] is None else f"{100 * scores['accuracy']:.1f} %"
            f1 = "" if scores["macro_f1"] is None else f"{scores['macro_f1']:.3f}"
            loss = "" if scores["loss"] is None else f"{scores['loss']:.4g}"
            rows.append(f"| {label} | {which} ({scores['examples']}) | {accuracy} | {f1} | {loss} |")
    if not rows:
        return ""
    note = "These are results of the whole shared model, not of this sub-model.\n\n" if export.form == "client" else ""
    head = "| | measured on | accuracy | macro-F1 | loss |\n|---|---|---|---|---|\n"
    return f"## Results\n\n{note}{head}" + "\n".join(rows) + "\n"


def _versions(run: RunFolder) -> str:
    written = tomllib.loads((run.path / "config.toml").read_text(encoding="utf-8")).get("versions", {})
    here = versions_here()
    text = "## Versions\n\nTrained with " + ", ".join(f"{name} {version}" for name, version in written.items()) + "."
    if here != written:
        text += "\nExported with " + ", ".join(f"{name} {version}" for name, version in here.items()) + "."
    return text + "\n"
