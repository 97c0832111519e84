"""The same rows through EleutherAI's lm-evaluation-harness, as a library: prompts, tokens, scores and figures agree."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from hfedmoe.config import DataConfig
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.data.known import KNOWN
from hfedmoe.data.pairs import encode_pairs
from hfedmoe.data.tasks import load_test
from hfedmoe.models.packaged import smollm2_folder
from hfedmoe.models.tiny import tiny_model
from hfedmoe.server.evaluation import evaluate, longest_input

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
TASKS = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "arc-easy": "arc/arc_easy.yaml",
    "arc-challenge": "arc/arc_challenge.yaml",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="module")
def mixtral(tokenizer):
    """Random, but with a real vocabulary; 512 positions."""
    return tiny_model(len(tokenizer), seed=3).eval()


@pytest.fixture(scope="module")
def llama_and_tokenizer():
    """A vocabulary with `<s>` in front of every text, as Llama has it."""
    tokenizer = sentencepiece()
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def t5_and_tokenizer():
    tokenizer = sentencepiece(suffix=True)
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5(config).eval(), tokenizer


def sentencepiece(suffix=False):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    corpus = (FIXTURES / "piqa.jsonl").read_text(encoding="utf-8")
    tokenizer.train_from_iterator(corpus.split() * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>" if suffix else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def harness_model(model, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def harness_task(settings, rows, cache):
    """The harness's task with these settings, on a local file instead of the hub."""
    from lm_eval.api.task import ConfigurableTask

    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    splits = {settings[name] for name in names if settings.get(name)}
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(splits, str(rows)), "cache_dir": str(cache)},
    }
    return ConfigurableTask(config=settings | local)


def shipped_task(name, cache):
    """The harness's own task, from its own file, on our rows."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = load_yaml(Path(lm_eval.tasks.__file__).parent / TASKS[name])
    return harness_task(settings, FIXTURES / f"{name}.jsonl", cache)


def harness_figures(model, task):
    """acc and acc_norm of all rows; the same of every row; and the log-probability of each of its choices."""
    from lm_eval.evaluator import evaluate as evaluate_with_harness

    # What `simple_evaluate` calls, without its seconds of reading task files and describing the machine.
    task.set_config("num_fewshot", 0)
    found = evaluate_with_harness(lm=model, task_dict={"tasks": {task.task_name: task}}, bootstrap_iters=0)
    (name,) = found["results"]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
    figures = found["results"][name]
    rows = [(sample["acc"], sample.get("acc_norm")) for sample in samples]
    return (figures["acc,none"], figures.get("acc_norm,none")), rows, scores


def our_scores(model, encoder, examples):
    """The log-probability of every choice: the loss of each, were it the right one."""
    scores = []
    for example in examples:
        row = []
        for choice, (_, answer) in enumerate(encoder.pairs([example])[0]):
            asked = Example(example.text, example.choices, choice)
            row.append(-evaluate(model, [asked], encoder, 4).loss * len(answer))
        scores.append(row)
    return scores


def assert_same(model, tokenizer, examples, template, expected):
    encoder_decoder = bool(model.config.is_encoder_decoder)
    encoder = Encoder(
        tokenizer,
        template,
        max_tokens=64,
        encoder_decoder=encoder_decoder,
        decoder_start_token_id=0,
        whole_prompts=True,
    )
    metrics = evaluate(model, examples, encoder, 3, "loglikelihood")
    (acc, acc_norm), rows, scores = expected
    assert metrics.accuracy == acc
    assert acc_norm in (None, metrics.accuracy_norm)  # MMLU's task has no acc_norm
    for example, (hit, hit_norm) in zip(examples, rows, strict=True):
        single = evaluate(model, [example], encoder, 3, "loglikelihood")
        assert single.accuracy == hit
        assert hit_norm in (None, single.accuracy_norm)
    for ours, theirs in zip(our_scores(model, encoder, examples), scores, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    return metrics


@pytest.mark.parametrize("name", TASKS)
def test_known_sets_are_the_harness_s_tasks(name, mixtral, tokenizer, tmp_path):
    """Prompt, choices and answer of every row; then acc, acc_norm and log-probabilities on the same model."""
    theirs = shipped_task(name, tmp_path)
    data = DataConfig(source=str(FIXTURES / f"{name}.jsonl"), format=name)
    task = load_test(data)
    assert len(task.test) == len(theirs.task_docs) >= 3
    for example, doc in zip(task.test, theirs.task_docs, strict=True):
        assert task.template.replace("{text}", example.text) == theirs.fewshot_context(doc, 0)
        assert list(example.choices) == theirs.doc_to_choice(doc)
        assert example.answer == int(theirs.doc_to_target(doc))
    expected = harness_figures(harness_model(mixtral, tokenizer), theirs)
    assert_same(mixtral, tokenizer, task.test, task.template, expected)


def test_hub_ids_and_splits_are_the_harness_s():
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent
    for name, file in TASKS.items():
        theirs, ours = load_yaml(folder / file), KNOWN[name]
        assert ours.hub == theirs["dataset_path"]
        assert ours.test == (theirs.get("test_split") or theirs["validation_split"])
        if name != "mmlu":  # theirs are its subjects
            assert ours.subset == theirs["dataset_name"]


def test_every_subject_of_mmlu_has_the_description_of_the_harness(tmp_path):
    import lm_eval.tasks

    files = sorted((Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"))
    described = {}
    for file in files:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        described[settings["dataset_name"]] = settings["description"]
    assert len(described) == 57
    row = {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 0}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row | {"subject": subject}) for subject in described), encoding="utf-8")
    texts = [example.text for example in load_test(DataConfig(source=str(rows), format="mmlu")).test]
    assert texts == [f"{text}q\nA. 1\nB. 2\nC. 3\nD. 4" for text in described.values()]


ROWS = [
    {"prompt": "Brush the cut side with", "choices": ["lemon juice", "lemon", "pebbles from the garden"], "answer": 0},
    {"prompt": "dry wet shoes", "choices": ["overnight", "in the sun for an hour"], "answer": 1},
    {
        "prompt": "How do you keep a cut apple from turning brown? Brush the cut side",
        "choices": ["é", "ab"],
        "answer": 1,
    },
    {"prompt": "change it", "choices": ["once", "twice", "once more", "never"], "answer": 2},
]


def local(template, rows, delimiter=" "):
    """Our rows as a task of the harness with the same prompt."""
    settings = {
        "task": "local",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": template.replace("{text}", "{{prompt}}"),
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": delimiter,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    examples = [Example(row["prompt"], tuple(row["choices"]), row["answer"]) for row in rows]
    return settings, examples


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("which", ["mixtral", "llama", "t5"])
@pytest.mark.parametrize(
    ("template", "delimiter"),
    [("Question: {text}\nAnswer:", " "), ("{text}", " "), ("Q: {text}\nA: ", ""), ("{text}\n", "")],
)
def test_our_own_rows(request, which, template, delimiter, rows_file, tmp_path):
    if which == "mixtral":
        model, tokenizer = request.getfixturevalue("mixtral"), request.getfixturevalue("tokenizer")
    else:
        model, tokenizer = request.getfixturevalue(f"{which}_and_tokenizer")
    settings, examples = local(template, ROWS, delimiter)
    expected = harness_figures(harness_model(model, tokenizer), harness_task(settings, rows_file, tmp_path))
    metrics = assert_same(model, tokenizer, examples, template, expected)
    assert math.isfinite(metrics.loss)


@pytest.mark.parametrize("which", ["llama", "t5"])
def test_long_prompts_are_cut_in_front(request, monkeypatch, which, rows_file, tmp_path):
    model, tokenizer = request.getfixturevalue(f"{which}_and_tokenizer")
    settings, examples = local("{text}\nAnswer:", ROWS)
    uncut = harness_figures(harness_model(model, tokenizer), harness_task(settings, rows_file, tmp_path))
    if which == "llama":
        monkeypatch.setattr(model.config, "max_position_embeddings", 14)
    else:
        monkeypatch.setattr(tokenizer, "model_max_length", 14)
    expected = harness_figures(harness_model(model, tokenizer), harness_task(settings, rows_file, tmp_path))
    assert expected[2] != uncut[2]
    assert_same(model, tokenizer, examples, "{text}\nAnswer:", expected)


@pytest.mark.parametrize("which", ["llama", "t5"])
def test_tokens_and_longest_input(request, which):
    model, tokenizer = request.getfixturevalue(f"{which}_and_tokenizer")
    theirs = harness_model(model, tokenizer)
    assert longest_input(model, tokenizer) == theirs.max_length == (64 if which == "llama" else 2048)
    pairs = [("dry wet", " shoes"), ("dry wet  \n ", "shoes"), ("<s>dry wet", " shoes"), ("dry", "  wet"), ("a", "b")]
    assert encode_pairs(tokenizer, pairs, which == "t5") == [theirs._encode_pair(*pair) for pair in pairs]
