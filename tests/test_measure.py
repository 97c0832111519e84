"""`hfedmoe evaluate`: on data sets with a name, on own rows, of runs and of models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfedmoe import measure
from hfedmoe.cli import main
from hfedmoe.config import ModelConfig, RunConfig, load_config
from hfedmoe.events import Watcher
from hfedmoe.measure import evaluate_model_on
from hfedmoe.models.loading import load
from hfedmoe.models.tiny import tiny_tokenizer
from hfedmoe.moe.experts import state
from hfedmoe.moe.experts.groups import group_pairs
from tests.families.table import build

FIXTURES = Path(__file__).parent / "data" / "fixtures"


def hfedmoe(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code or 0


def naive_arc(path):
    """acc, acc_norm and loss of the tiny model on rows of ARC, from the rows themselves, a choice at a time."""
    loaded = load(ModelConfig(name="tiny"), RunConfig().seed)
    loaded.model.eval()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    hits, hits_norm, loss, tokens = 0, 0, 0.0, 0
    for row in rows:
        prompt, texts = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        begin, scores = len(loaded.tokenizer(prompt)["input_ids"]), []
        answer = row["choices"]["label"].index(row["answerKey"])
        for number, text in enumerate(texts):
            ids = loaded.tokenizer(f"{prompt} {text}")["input_ids"]
            with torch.no_grad():
                log_probs = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(begin, len(ids))))
            if number == answer:
                loss, tokens = loss - scores[-1], tokens + len(ids) - begin
        shares = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        hits += scores.index(max(scores)) == answer
        hits_norm += shares.index(max(shares)) == answer
    return hits / len(rows), hits_norm / len(rows), loss / tokens


def test_evaluate_a_model_on_a_task(tmp_path, capsys):
    rows = tmp_path / "arc-easy.jsonl"  # in words that the tiny model knows
    choices = {"text": ["oil", "grain prices", "a ship", "trade"], "label": ["A", "B", "C", "D"]}
    asked = ("what does the bank trade", "what did the oil company sell", "who said that prices rose")
    lines = [{"question": text, "choices": choices, "answerKey": "ABD"[n]} for n, text in enumerate(asked)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert hfedmoe("evaluate", "tiny", "--task", "arc-easy", "--rows", rows, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    accuracy, accuracy_norm, loss = naive_arc(rows)
    assert whole["examples"] == 3
    assert (whole["accuracy"], whole["accuracy_norm"]) == (accuracy, accuracy_norm)
    assert whole["loss"] == pytest.approx(loss, rel=1e-5)
    assert hfedmoe("evaluate", "tiny", "--task", "arc-easy", "--rows", rows, "--limit", 2) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("acc ")
    assert "acc_norm" in line
    assert line.endswith("on 2 rows")


def test_choices_that_become_the_same_tokens_are_named(capsys):
    assert hfedmoe("evaluate", "tiny", "--task", "arc-easy", "--rows", FIXTURES / "arc-easy.jsonl") == 2
    error = capsys.readouterr().err
    assert "become the same tokens; change one of them or remove the row" in error
    assert "arc-easy.jsonl line" in error


def test_evaluate_a_run_on_a_task(tmp_path, capsys):
    folder, rows = tmp_path / "run", FIXTURES / "piqa.jsonl"
    small = ["federation.rounds=1", "clients.count=2", "train.steps=1", "data.train_rows=40", "data.test_rows=4"]
    # Its own rows by first token; these choices begin with the same token, and --task compares them whole.
    small += ["evaluation.watch_rows=0", "train.loss=choices", "evaluation.scoring=first_token"]
    config = Path(__file__).parents[1] / "configs" / "tiny.toml"
    assert hfedmoe("run", config, "--out", folder, *(part for key in small for part in ("--set", key))) == 0
    capsys.readouterr()
    figures = []
    for target in ([folder, "--checkpoint", 0], [folder, "--checkpoint", "last"], ["tiny"]):
        assert hfedmoe("evaluate", *target, "--task", "piqa", "--rows", rows, "--json") == 0
        figures.append(json.loads(capsys.readouterr().out))
    start, end, model = figures
    assert start["examples"] == 4
    assert start["accuracy_norm"] == model["accuracy_norm"] is not None
    assert start["loss"] == pytest.approx(model["loss"], rel=1e-5)  # nothing was trained yet
    assert end["loss"] != pytest.approx(start["loss"], rel=1e-5)


def saved(folder, name):
    """A folder with a tiny random model and the tiny tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "dense":
        model = LlamaForCausalLM(LlamaConfig(**size, **sizes))
    else:
        model = build(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny", []),
        ("mixtral", []),
        ("mixtral", ["model.expert_dtype=float32"]),
        ("deepseek_v3", []),
        ("switch_transformers", []),
        ("dense", []),
    ],
)
def test_padding_runs_no_experts_and_changes_no_figure(tmp_path, monkeypatch, name, settings):
    model = "tiny" if name == "tiny" else str(saved(tmp_path / "model", name))
    rows = tmp_path / "rows.jsonl"
    texts = ["oil", "the bank said that prices rose and that trade fell", "grain prices", "a ship of the oil company"]
    rows.write_text("".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    settings = [f"model.name={model}", f"data.source={rows}", "model.device=cpu", *settings]
    config = load_config(None, settings)
    pairs = []

    def counting(experts, number, *rest):
        pairs.append((len(experts), int((experts < number).sum())))
        return group_pairs(experts, number, *rest)

    monkeypatch.setattr(state, "group_pairs", counting)
    figures = evaluate_model_on(model, config.data, config, Watcher())
    assert any(running < of for of, running in pairs) == (name != "dense")
    # One row at a time there is no padding.
    pairs.clear()
    alone = load_config(None, [*settings, "evaluation.batch_size=1"])
    assert evaluate_model_on(model, alone.data, alone, Watcher()).loss == pytest.approx(figures.loss, rel=1e-5)
    assert all(running == of for of, running in pairs)
    if "model.expert_dtype=float32" not in settings:  # stock experts cannot compute with a store
        monkeypatch.setattr(measure, "_skip_padding", lambda loaded: None)
        stock = evaluate_model_on(model, config.data, config, Watcher())
        assert (stock.accuracy, stock.macro_f1, stock.examples) == (figures.accuracy, figures.macro_f1, 4)
        assert stock.loss == pytest.approx(figures.loss, rel=1e-5)


def own_rows(path):
    """Eight rows of multiple choice in columns of their own."""
    rows = [{"q": "bank", "options": ["oil rose", "trade fell"], "right": i % 2} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_evaluate_a_model_on_own_rows(tmp_path, capsys):
    rows = own_rows(tmp_path / "own.jsonl")
    config = tmp_path / "own.toml"
    settings = '[data]\ntext = "q"\nchoices = "options"\nanswer = "right"\ntemplate = "{text}:"\n'
    config.write_text(settings, encoding="utf-8")
    assert hfedmoe("evaluate", "tiny", "--rows", rows, "--config", config, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["examples"], whole["accuracy"], whole["macro_f1"]) == (8, 0.5, None)
    assert whole["accuracy_norm"] is not None
    given = [part for line in settings.splitlines()[1:] for part in ("--set", "data." + line.replace(" = ", "="))]
    assert hfedmoe("evaluate", "tiny", "--rows", rows, *given, "--json") == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert hfedmoe("evaluate", "tiny", "--rows", rows, "--config", config, "--limit", 3) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on 3 rows")
    # The config's data set may have a name: the rows are as its rows.
    named = ["--rows", FIXTURES / "piqa.jsonl", "--set", "data.source=piqa"]
    assert hfedmoe("evaluate", "tiny", *named) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on 4 rows")
    # A shipped config by its name, with a task as without one.
    assert hfedmoe("evaluate", "tiny", "--task", "piqa", "--rows", FIXTURES / "piqa.jsonl", "--config", "tiny") == 0


def test_evaluate_a_folder_of_splits(tmp_path, capsys):
    import datasets

    rows = [json.loads(line) for line in (FIXTURES / "piqa.jsonl").read_text(encoding="utf-8").splitlines()]
    splits = {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows[:2])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "piqa"))
    assert hfedmoe("evaluate", "tiny", "--task", "piqa", "--rows", tmp_path / "piqa") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on 2 rows")
    datasets.DatasetDict(train=splits["train"], test=splits["validation"]).save_to_disk(str(tmp_path / "own"))
    for given in ([], ["--set", "data.split=test"], ["--set", "data.test=test"]):
        assert hfedmoe("evaluate", "tiny", "--task", "piqa", "--rows", tmp_path / "own", *given) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith("on 2 rows")
    assert hfedmoe("evaluate", "tiny", "--rows", tmp_path / "own", "--set", "data.source=piqa") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("on 2 rows")
    datasets.DatasetDict(train=splits["train"]).save_to_disk(str(tmp_path / "half"))
    assert hfedmoe("evaluate", "tiny", "--task", "piqa", "--rows", tmp_path / "half") == 2
    assert 'half: no split "validation"; it has train' in capsys.readouterr().err


def test_rows_without_the_columns_of_conversations_are_told_by_their_own(tmp_path, capsys):
    config = tmp_path / "talks.toml"
    config.write_text('[data]\nformat = "instructions"\nchat = "plain"\n', encoding="utf-8")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "bank,a\noil,b\n" * 3, encoding="utf-8")
    assert hfedmoe("evaluate", "tiny", "--rows", rows, "--config", config, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] is not None
    talks = ["--rows", FIXTURES / "instructions-alpaca.jsonl", "--config", config, "--json"]
    assert hfedmoe("evaluate", "tiny", *talks) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] is None


def test_settings_given_with_a_task_reach_it(capsys):
    arguments = ["evaluate", "tiny", "--task", "piqa", "--rows", FIXTURES / "piqa.jsonl", "--json"]
    losses = []
    for given in ([], ["--set", "data.template=x{text}"]):
        assert hfedmoe(*arguments, *given) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] != losses[1]
    assert hfedmoe("evaluate", "tiny", "--task", "reuters-r8", "--set", 'data.label_words={nothing="x"}') == 2
    assert 'no row has the label "nothing"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "name"), [("piqa", "piqa"), ("instructions", "instructions"), ("hellaswag", "hellaswag")]
)
def test_rows_of_a_named_set_without_its_name_are_told_which(file, name, capsys):
    assert hfedmoe("evaluate", "tiny", "--rows", FIXTURES / f"{file}.jsonl") == 2
    assert f'looks like rows of {name}; if so, set data.format = "{name}"' in capsys.readouterr().err


def test_conversations_for_a_tokenizer_without_a_template(capsys):
    arguments = ["evaluate", "tiny", "--task", "instructions", "--rows", FIXTURES / "instructions.jsonl"]
    assert hfedmoe(*arguments) == 2
    assert 'else set data.chat = "plain" (--set data.chat=plain)' in capsys.readouterr().err
    assert hfedmoe(*arguments, "--set", "data.chat=plain") == 0


def test_evaluate_a_run_on_own_rows(tmp_path, capsys):
    folder, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    small = ["federation.rounds=1", "clients.count=2", "train.steps=1", "data.train_rows=40", "data.test_rows=4"]
    config = Path(__file__).parents[1] / "configs" / "tiny.toml"
    assert hfedmoe("run", config, "--out", folder, *(part for key in small for part in ("--set", key))) == 0
    rows.write_text('{"text": "oil rose", "label": "crude"}\n', encoding="utf-8")  # one label, of the eight it knows
    assert hfedmoe("evaluate", folder, "--rows", rows, "--json") == 0
    capsys.readouterr()
    assert hfedmoe("evaluate", folder, "--rows", rows, "--set", "train.lr=1") == 2
    assert "--set: a run keeps its own settings; only data.* can change" in capsys.readouterr().err
    assert hfedmoe("evaluate", folder, "--set", "data.max_tokens=9") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "pica"], "--task pica: not a known data set; known: ag-news, 20newsgroups"),
        (
            ["--task", "mmlu:anatomy", "--rows", "rows.jsonl"],
            "--task mmlu:anatomy with --rows: a file is measured whole; use --task mmlu and",
        ),
        (["--task", "reuters-r8:earn"], "--task reuters-r8:earn: reuters-r8 has no subsets; use --task reuters-r8"),
        (["--limit", "3"], "--limit: needs --task or --rows"),
        (["--task", "piqa", "--rows", "gone.jsonl"], "--rows gone.jsonl: no such file or folder"),
        (["--task", "piqa", "--rows", "owner/name"], "--rows owner/name: no such file or folder"),
        (["--rows", "piqa"], "--rows piqa: no such file or folder"),
    ],
)
def test_bad_requests_on_the_command_line(capsys, arguments, message):
    assert hfedmoe("evaluate", "tiny", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
