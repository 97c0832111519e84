"""`hfedmoe export` on a real short run: what it writes, how its card is used, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from hfedmoe import cli
from hfedmoe.config import (
    ClientsConfig,
    DataConfig,
    FederationConfig,
    MethodConfig,
    ModelConfig,
    PartitionConfig,
    RunConfig,
    TrainConfig,
)
from hfedmoe.export import exporting
from hfedmoe.export.card import Export, card
from hfedmoe.export.provenance import data_name, hub_data_set, origin
from hfedmoe.export.snippet import Loading, loading_code
from hfedmoe.method.methods import METHODS
from hfedmoe.models.loading import load
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.payload import global_tensors
from hfedmoe.moe.payload import load as put
from hfedmoe.runs.folder import RunFolder
from tests.commands import hfedmoe
from tests.export.stock import stock_logits

CLIENT = 3
FORMS = {
    "merged": [],
    "adapter": ["--as", "adapter"],
    "client": ["--as", "client", "--client", str(CLIENT), "--checkpoint", "last"],
    "small": ["--dtype", "bfloat16", "--checkpoint", "1"],
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a short finished run that trained experts, routers and attention."""
    out = tmp_path_factory.mktemp("finished") / "run"
    smaller = ["federation.rounds=1", "train.steps=2", "data.test_rows=20", "train.attention=true"]
    assert hfedmoe("run", "tiny", "--out", out, *(part for value in smaller for part in ("--set", value))) == 0
    return out


@pytest.fixture(scope="session")
def exports(finished, tmp_path_factory):
    """name -> folder of every form of export of that run."""
    root = tmp_path_factory.mktemp("exports")
    for name, options in FORMS.items():
        assert hfedmoe("export", finished, root / name, *options) == 0
    return {name: root / name for name in FORMS}


@torch.no_grad()
def expected(run: Path, tokens: Tensor, experts: list[list[int]] | None = None) -> Tensor:
    """Logits of the run's model with its trained tensors beside the weights, masked to some experts."""
    with RunFolder.open(run) as folder:
        config, tensors = folder.config, folder.load_checkpoint("last").tensors
    model = wrap(load(config.model, config.seed).model, config)
    put(model, tensors, [torch.ones(number, dtype=torch.bool) for number in model.num_experts])
    if experts is not None:
        resident = [torch.zeros(number, dtype=torch.bool) for number in model.num_experts]
        for mask, kept in zip(resident, experts, strict=True):
            mask[kept] = True
        model.set_resident(resident)
    return model.model.eval()(tokens).logits


def test_stock_libraries_give_the_logits_of_the_run_and_the_cards_work(finished, exports, tmp_path):
    tokens = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    x = {"input_ids": tokens}
    kept = [layer["experts"] for layer in json.loads((exports["client"] / "experts.json").read_text())["layers"]]
    found = stock_logits(
        {
            "merged": (exports["merged"], None, x),
            "adapter": (exports["adapter"], exports["adapter"] / "base", x),
            "client": (exports["client"], None, x),
            "base": (exports["adapter"] / "base", None, x),
        },
        tmp_path,
        cards=[folder / "README.md" for folder in exports.values()],
    )
    whole = expected(finished, tokens)
    assert (found["merged"] - whole).abs().max() <= 1e-5
    assert (found["adapter"] - whole).abs().max() <= 1e-5
    assert (found["client"] - expected(finished, tokens, kept)).abs().max() <= 1e-5
    assert (found["base"] - whole).abs().max() > 0.01  # the base is what it was before training
    assert (found["client"] - whole).abs().max() > 0.01


def test_the_cards_say_what_the_run_folder_knows(finished, exports):
    with RunFolder.open(finished) as run:
        start, end = run.read_rounds()
        version = re.search(r'torch = "(.*)"', (finished / "config.toml").read_text())[1]
    before, after = (line["evaluation"]["all"] for line in (start, end))
    for name, folder in exports.items():
        card = ModelCard((folder / "README.md").read_text())
        data = card.data.to_dict()
        assert {"hfedmoe", "moe", "federated-learning"} <= set(data["tags"])
        assert data["library_name"] == ("peft" if name == "adapter" else "transformers")
        assert not {"base_model", "license", "datasets"} & set(data)  # a random model has none
        text = card.text
        assert "reuters-r8" in text
        assert "Dirichlet 0.3 over the labels, seed 0" in text
        assert f"Training rows: {sum(row['examples'] for row in end['clients'])}, of 4 clients" in text
        assert "LoRA of rank 4, alpha 16" in text
        assert "LoRA of rank 4, alpha 16, on the attention projections; routers" in text
        assert "2 steps of batch 8, AdamW, learning rate 0.01" in text
        assert ("of the whole shared model, not of this sub-model" in text) == (name == "client")
        assert f"| before | all held-out rows (20) | {100 * before['accuracy']:.1f} % |" in text
        assert f"| round 1 | all held-out rows (20) | {100 * after['accuracy']:.1f} % |" in text
        for row, budget in zip(end["clients"], ("25%", "50%", "100%", "12"), strict=True):
            this = " (this one)" if name == "client" and row["client"] == CLIENT else ""
            assert f"| {row['client']}{this} | {budget} | {row['resident']} of 32 | {row['examples']} |" in text
        assert f"torch {version}" in text
        assert "None" not in text
    assert "Precision of these files: bfloat16" in (exports["small"] / "README.md").read_text()


def test_the_sub_model_is_what_the_client_valued(finished, exports):
    note = json.loads((exports["client"] / "experts.json").read_text())
    with RunFolder.open(finished) as run:
        rows = run.read_expert_rows()
    resident = rows["resident"][rows["client"] == CLIENT][-1]
    assert (note["client"], note["experts_held"], note["experts_per_layer"]) == (CLIENT, 12, 3)
    assert (note["round"], note["scores_of_round"]) == (1, 1)
    assert json.loads((exports["client"] / "config.json").read_text())["num_local_experts"] == 3
    text = (exports["client"] / "README.md").read_text()
    for layer, entry in enumerate(note["layers"]):
        held = [expert for expert in entry["experts"] if resident[layer, expert]]
        assert len(entry["experts"]) == 3
        assert len(held) == min(3, int(resident[layer].sum()))
        assert f"| {layer} | 3 of 8 | {', '.join(map(str, entry['experts']))} |" in text


def test_files_have_the_precision_that_was_asked_for(exports):
    for name, dtype in (("merged", "F32"), ("small", "BF16"), ("adapter", "F32")):
        (file,) = exports[name].glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {dtype}  # noqa: SIM118
    merged, small = ((exports[name] / "model.safetensors").stat().st_size for name in ("merged", "small"))
    assert small < 0.6 * merged
    assert (exports["merged"] / "model.safetensors").stat().st_mode & 0o044  # others may read it


def test_every_folder_has_a_tokenizer(exports):
    for folder in (*exports.values(), exports["adapter"] / "base"):
        assert len(AutoTokenizer.from_pretrained(folder)) > 500, folder


def test_the_best_checkpoint_is_not_the_last(own, tmp_path, capsys):
    shutil.copytree(own / "run", tmp_path / "run")
    with RunFolder.open(tmp_path / "run", to_write=True) as run:
        best = run.load_checkpoint("last").tensors
        run.save_checkpoint(1, {name: tensor + 1 for name, tensor in best.items()}, {}, score=0.25)
    for which, round in (("best", 0), ("last", 1)):
        assert hfedmoe("export", tmp_path / "run", tmp_path / which, "--checkpoint", which) == 0
        assert f"of round {round}" in capsys.readouterr().out
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    kept, last = (load_file(tmp_path / which / "model.safetensors")[gate] for which in ("best", "last"))
    assert torch.equal(kept + 1, last)
    # Experts that were held in 4 bit are as they were stored.
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    stored = load_file(own / "model" / "model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "best" / "model.safetensors")[name], stored)


def test_the_adapter_names_its_base(exports):
    config = json.loads((exports["adapter"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exports["adapter"] / "base")
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 16, "CAUSAL_LM")
    assert sorted(config["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["modules_to_save"] == ["mlp.gate"]


# an own model, upcycled, whose folder has a card; experts that were held in 4 bit


@pytest.fixture(scope="session")
def own(exports, tmp_path_factory):
    """A run (of which no round was finished) on a local folder, and a checkpoint of its start."""
    root = tmp_path_factory.mktemp("own")
    shutil.copytree(exports["merged"], root / "model")
    (root / "model" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/something\n---\n# Mine\n")
    model = ModelConfig(name=str(root / "model"), expert_dtype="4bit")
    config = RunConfig(model=model, train=TrainConfig(rank=2))
    with RunFolder.create(root / "run", config) as run:
        whole = wrap(load(model.model_copy(update={"expert_dtype": "same"}), 0).model, config)
        run.save_checkpoint(0, global_tensors(whole), {}, score=0.5)
    return root


def test_a_run_on_a_relative_folder_is_exported_from_anywhere(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own)
    settings = [
        "model.name=./model",
        "model.dtype=bfloat16",
        "federation.rounds=1",
        "train.steps=1",
        "data.test_rows=8",
    ]
    options = [part for value in settings for part in ("--set", value)]
    assert hfedmoe("run", "tiny", "--out", tmp_path / "run", *options) == 0
    monkeypatch.chdir(tmp_path)
    assert hfedmoe("export", "run", "out", "--dtype", "float32") == 0
    base, merged = (load_file(folder / "model.safetensors") for folder in (own / "model", tmp_path / "out"))
    # What was not trained is as it is stored, although the run rounded it.
    assert torch.equal(base["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(base["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16().float())


def test_an_adapter_of_a_folder_refers_to_it(own, capsys):
    out = own / "adapter"
    assert hfedmoe("export", own / "run", out, "--as", "adapter") == 0
    assert str(own / "model") in capsys.readouterr().out
    assert not (out / "base").exists()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(own / "model")
    card = ModelCard((out / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("mit", None)
    assert f"from_pretrained('{own / 'model'}', dtype=\"float32\")" in card.text
    assert "The path of the base in `adapter_config.json` and the code below is from the machine" in card.text
    assert "held the frozen experts as 4bit" in card.text
    assert "## Results" not in card.text  # nothing was measured
    assert "## Clients" not in card.text


def test_the_origin_of_a_model_is_what_is_known_here(own, tmp_path, monkeypatch):
    smollm2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})
    assert origin(ModelConfig(name="smollm2")) == smollm2
    assert origin(ModelConfig(name="tiny")) == (None, {})
    assert origin(ModelConfig(name="nobody/not-in-the-cache")) == ("nobody/not-in-the-cache", {})
    assert origin(ModelConfig(name=str(own / "model"))) == (None, {"license": "mit"})  # not of what it was made from
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "README.md"))
    link = "https://huggingface.co/who/what/blob/main/LICENSE"
    named = {"license": "other", "license_name": "own", "license_link": link}
    assert origin(ModelConfig(name="who/what")) == ("who/what", named)


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"---\nlicense: mit\ntags: [\n---\n", {}),
        (b"---\n- license\n- mit\n---\n", {}),
        (b"---\nlicense: 3\n---\n", {}),
        (b"# no front matter\n", {}),
        (b"---\nlicense: mit\nauthor: Andr\xe9\n---\n", {"license": "mit"}),
        (b"---\nlicense: [mit, apache-2.0]\n3: 4\n---\n", {"license": ["mit", "apache-2.0"]}),
    ],
)
def test_a_card_written_by_hand_stops_no_export(tmp_path, card, found):
    (tmp_path / "README.md").write_bytes(card)
    assert origin(ModelConfig(name=str(tmp_path))) == (None, found)


def test_conversations_are_prompted_with_the_chat_template(own, tmp_path, monkeypatch, capsys):
    shutil.copytree(own / "model", tmp_path / "model")
    turns = "{% for m in messages %}News : {% endfor %}{% if add_generation_prompt %}Topic :{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(turns)
    config = RunConfig(
        model=ModelConfig(name=str(tmp_path / "model")),
        data=DataConfig(source="talks.jsonl", format="instructions", max_tokens=99),
        train=TrainConfig(rank=2),
    )
    with RunFolder.create(tmp_path / "run", config) as run:
        tensors = global_tensors(wrap(load(config.model, 0).model, config))
        run.save_checkpoint(0, tensors, {})
    assert hfedmoe("export", tmp_path / "run", tmp_path / "out", "--checkpoint", "last") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "* Prompt: the tokenizer's chat template, cut to the last 99 tokens.\n" in text
    assert "{text}" not in text
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "out")
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    assert capsys.readouterr().out.startswith("News : Topic :")


def test_the_code_of_a_card_says_how_the_run_prompted():
    plain = RunConfig(data=DataConfig(source="instructions", chat="plain"))
    assert "tokenizer('User: ...\\n\\nAssistant:'" in loading_code(plain, Loading("float32"))
    own = RunConfig(data=DataConfig(template="{text} is about"))
    assert "tokenizer('... is about'" in loading_code(own, Loading("float32"))
    half = RunConfig(model=ModelConfig(name="who/what", dtype="bfloat16", revision="abc"))
    assert 'from_pretrained(folder, dtype="bfloat16")' in loading_code(half, Loading("bfloat16"))
    code = loading_code(half, Loading("float32", base="who/what"))
    assert "from_pretrained('who/what', revision='abc', dtype=\"float32\")" in code
    assert "PEFT would round the adapter" in code


def test_only_data_that_is_on_the_hub_is_named_as_a_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    found = {
        source: (hub_data_set(DataConfig(source=source)), data_name(DataConfig(source=source)))
        for source in ("reuters-r8", "reuters-r52", "ag-news", "arc-easy", "who/what", "some/folder", "data/rows.csv")
    }
    assert found == {
        "reuters-r8": (None, "`reuters-r8`"),
        "reuters-r52": (None, "`reuters-r52`"),
        "ag-news": ("fancyzhx/ag_news", "`ag-news` (`fancyzhx/ag_news`)"),
        "arc-easy": ("allenai/ai2_arc", "`arc-easy` (`allenai/ai2_arc`), subset `ARC-Easy`"),
        "who/what": ("who/what", "`who/what`"),
        "some/folder": (None, "`folder`"),
        "data/rows.csv": (None, "`rows.csv`"),
    }
    assert hub_data_set(DataConfig(source="rows.csv", format="ag-news")) is None
    assert hub_data_set(DataConfig(clients=["a/b", "a/c"])) is None
    assert data_name(DataConfig(clients=["a/b.csv", "a/c.csv"])) == "a file per client: `b.csv`, `c.csv`"
    assert data_name(DataConfig(source="who/what", subset="all")) == "`who/what`, subset `all`"


def test_results_have_the_figures_that_were_measured(tmp_path):
    piqa = {"accuracy": 0.5, "accuracy_norm": 0.625, "macro_f1": None, "loss": 2.0, "examples": 8}
    config = RunConfig(data=DataConfig(source="piqa"), partition=PartitionConfig(scheme="iid"))
    with RunFolder.create(tmp_path / "run", config) as run:
        run.append_round({"round": 0, "evaluation": {"all": piqa}, "clients": []})
        run.save_checkpoint(0, {"router.0.weight": torch.zeros(2)}, {})
        text = card(
            run, run.load_checkpoint("last"), Export("merged", "float32", model_type="mixtral", num_experts=[4])
        )
    assert "| | measured on | accuracy | acc_norm | loss |\n|---|---|---|---|---|\n" in text
    assert "| before | all held-out rows (8) | 50.0 % | 62.5 % | 2 |\n" in text
    assert ModelCard(text).data.datasets == "baber/piqa"


def card_of(folder: Path, config: RunConfig, export: Export) -> str:
    """The card of a run of which one round is written down."""
    with RunFolder.create(folder, config) as run:
        row = {"client": 0, "status": "ok", "resident": 4, "examples": 9}
        run.append_round({"round": 1, "evaluation": {}, "clients": [row]})
        run.save_checkpoint(1, {"router.0.weight": torch.zeros(2)}, {})
        return card(run, run.load_checkpoint("last"), export)


def test_a_card_says_only_what_is_so(tmp_path):
    export = Export("adapter", "float32", "base", model_type="llama4_text", whole_type="llama4", num_experts=[4])
    own = card_of(tmp_path / "own", RunConfig(), export)
    assert "fine-tuned it with HFedMoE" in own
    assert "The trained parts of the model (LoRA of rank 8, alpha 16, on every expert, routers) as a PEFT" in own
    assert "| LoRA pairs | A and B averaged one by one |" in own
    assert "The base is a llama4 model; this is only its text model" in own
    assert "| 0 | 25% | 4 of 4 | 9 |" in own
    assert "`train." not in own  # the defaults
    other = RunConfig(
        method=MethodConfig(score="random", residency="all"),
        train=TrainConfig(
            experts="frozen", router=False, attention=True, rank=2, lora="exact", loss="choices", max_grad_norm=None
        ),
        federation=FederationConfig(clients_per_round=3),
    )
    text = card_of(tmp_path / "other", other, export)
    assert "HFedMoE" not in text
    assert "| a client holds | everything |" in text
    assert "fine-tuned it (expert score `random`, residency `all`)" in text
    assert "The trained parts of the model (LoRA of rank 2, alpha 16, on the attention projections) as" in text
    assert "| LoRA pairs | products B A averaged |" in text
    assert "| 0 | 4 of 4 | 9 |" in text
    assert "| budget |" not in text
    assert "Budgets" not in text
    unusual = [
        "| `train.max_grad_norm` | none |",
        "| `train.loss` | choices |",
        "| `federation.clients_per_round` | 3 |",
    ]
    assert unusual == re.findall(r"^\| `.*", text, re.MULTILINE)


@pytest.mark.parametrize("name", METHODS)
def test_a_card_describes_the_method_of_its_run_and_no_other(tmp_path, name):
    row = METHODS[name]
    options = {option.name: option.usual for option in row.options}
    text = card_of(
        tmp_path / "run",
        RunConfig(method=MethodConfig(name=name, options=options)),
        Export("merged", "float32", model_type="mixtral", num_experts=[4]),
    )
    assert ("HFedMoE" in text) == ("2601.00583" in text) == (name == "hfedmoe")
    assert (f"with the method `{name}`" in text) == (name != "hfedmoe")
    if row.source.startswith("arXiv"):
        assert f"([paper](https://arxiv.org/abs/{row.source.split()[1]}))" in text
    words = {"a client holds": row.holds, "a client trains": row.trains, "a client sends": row.travels}
    for key, value in {"method": f"`{name}`", **words, "the server": row.server}.items():
        assert f"| {key} | {value} |\n" in text
    read = {"expert score", "lam", "beta", "tau", "residency", "expert weight", "gate rule"} & {
        line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()
    }
    every = {"expert score", "lam", "beta", "tau", "residency", "expert weight", "gate rule"}
    ranked = {"expert score", "residency"}
    assert read == {
        "hfedmoe": every,
        "hfedmoe+": every - {"lam", "beta", "gate rule"},
        "local": {*ranked, "lam", "beta"},
        "frequency": ranked,
        "fedmoe": ranked,
        "fedmoe_full": ranked,
        "flex": ranked,
        "flex_moe": ranked,
        "flux": ranked,
        "flame": set(),
        "hetlora": set(),
        "flexlora": set(),
        "unlimited": set(),
        "pooled": set(),
    }.get(name, {"residency"})
    assert ("on every expert" in text) == (name != "flex")
    for option in row.options:
        assert f"| {option.about} | {option.usual:g} |" in text
    assert ("budget | experts held" in text) == (name not in ("unlimited", "pooled"))
    assert "`method." not in text  # the defaults


def test_a_run_whose_base_model_was_replaced_is_not_exported(tmp_path, capsys):
    run, rows = replaced(tmp_path)
    out = tmp_path / "out"
    forms = (["merged"], ["client", "--client", "0"], ["adapter"])
    for form in forms:
        assert hfedmoe("export", run, out, "--as", *form) == 0
        shutil.rmtree(out)
    replace_base(tmp_path / "model")
    for form in forms:
        capsys.readouterr()
        assert hfedmoe("export", run, out, "--as", *form) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run}: its base model changed since the run began; restore the model of model.name" in line
        assert not out.exists()
    assert hfedmoe("evaluate", run, "--rows", rows) == 2
    assert "its base model changed since the run began" in capsys.readouterr().err


def replaced(root: Path) -> tuple[Path, Path]:
    """A run on a folder, and a file of rows."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), 0).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    settings = [f"model.name={root / 'model'}", "federation.rounds=1", "clients.count=2", "train.steps=1"]
    settings += ["data.train_rows=40", "data.test_rows=4"]
    assert hfedmoe("run", "tiny", "--out", root / "run", *(part for key in settings for part in ("--set", key))) == 0
    (root / "rows.jsonl").write_text('{"text": "oil rose", "label": "crude"}\n', encoding="utf-8")
    assert hfedmoe("evaluate", root / "run", "--rows", root / "rows.jsonl") == 0
    return root / "run", root / "rows.jsonl"


def replace_base(folder: Path) -> None:
    tiny_model(len(tiny_tokenizer()), 1).save_pretrained(folder)


@pytest.mark.parametrize("same", [False, True])
def test_only_a_head_that_is_the_embedding_is_said_to_be_tied(own, exports, tmp_path, same):
    shutil.copytree(own / "model", tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    settings = [f"model.name={tmp_path / 'model'}", "federation.rounds=1", "clients.count=2", "train.steps=1"]
    settings += ["data.train_rows=40", "data.test_rows=4"]
    options = [part for key in settings for part in ("--set", key)]
    assert hfedmoe("run", "tiny", "--out", tmp_path / "run", *options) == 0
    for name, *form in (["merged"], ["client", "--client", "0"]):
        out = tmp_path / name
        assert hfedmoe("export", tmp_path / "run", out, "--as", name, *form) == 0
        written = json.loads((out / "config.json").read_text())
        assert written["tie_word_embeddings"] is same
        head = load_file(out / "model.safetensors").get("lm_head.weight")
        assert (head is None) if same else torch.equal(head, tensors["lm_head.weight"])
        loaded = load(ModelConfig(name=str(out), device="cpu"), 0).model
        assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
        assert torch.equal(loaded.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


# errors


def test_user_errors_are_one_line_and_exit_code_2(finished, own, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    for name, train in (("unfinished", TrainConfig()), ("whole", TrainConfig(experts="full"))):
        RunFolder.create(tmp_path / name, RunConfig(train=train, clients=ClientsConfig(count=2))).close()
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "gone", out), "no such run folder"),
        ((full, out), "not a run folder"),
        ((tmp_path / "unfinished", out), "no checkpoint yet"),
        ((finished, full), "is not empty"),
        ((finished, full / "note.txt"), "is a file"),
        ((finished, full / "note.txt" / "below"), "cannot be written"),
        ((finished, finished / "checkpoints" / "round-0009"), "is in the run's own folder"),
        ((finished, finished), "is in the run's own folder"),
        ((finished, out, "--as", "client", "--client", "4"), "the run has clients 0 to 3"),
        ((finished, out, "--as", "client", "--client", "-1"), "the run has clients 0 to 3"),
        ((finished, out, "--as", "client"), "add --client"),
        ((finished, out, "--client", "1"), "allowed only with --as client"),
        ((finished, out, "--as", "zip"), "expected merged, adapter, client"),
        ((finished, out, "--dtype", "int8"), "expected float32"),
        ((finished, out, "--checkpoint", "9"), "no checkpoint of round 9"),
        ((finished, out, "--checkpoint", "\N{SUPERSCRIPT TWO}"), "expected last, best or the number"),
        ((finished, out, "--checkpoint", "worst"), "expected last, best or the number"),
        ((tmp_path / "whole", out, "--as", "adapter"), "--as merged"),
        ((own / "run", out, "--as", "client", "--client", "0"), "has no experts.npy"),
    ]
    for arguments, message in cases:
        code = hfedmoe("export", *arguments)
        errors = capsys.readouterr().err.splitlines()
        assert (code, len(errors)) == (2, 1), (arguments, errors)
        assert message in errors[0], (arguments, errors)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_failed_export_leaves_nothing(finished, tmp_path, monkeypatch):

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(exporting, "card", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["export", str(finished), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
