"""Devices with data of their own, and what leaves them: the real ClientApp, without a network."""

import contextlib
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from hfedmoe import deployment
from hfedmoe.config import config_from_text
from hfedmoe.data.terms import Terms
from hfedmoe.events import Silent
from hfedmoe.models.digest import base_digest, tokenizer_digest
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.moe.payload import pack
from hfedmoe.prepare import Prepared, prepare, server_for
from hfedmoe.server.keeper import Keeper
from hfedmoe.wire import checks, requests
from hfedmoe.wire.checks import TroubleError
from hfedmoe.wire.messages import (
    DESCRIBE,
    InvalidReplyError,
    facts_of,
    record,
    tensors_of,
    train_request,
    unpack_bits,
)
from hfedmoe.wire.same import Digests
from tests.deployment.nodes import Node, check_holds_no_row, request, rows_file

CONFIG = """
threads = 1
[model]
name = "{model}"
[data]
source = "{source}"
test_rows = 4
[clients]
count = 3
budgets = ["50%"]
[train]
steps = 2
batch_size = 4
[partition]
scheme = "iid"
min_rows = 1
[evaluation]
watch_rows = 0
"""
SHARED = {"shared-data": True}
"""Of a node that reads the file that the run names."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The server's rows, which have all three labels."""
    return rows_file(tmp_path / "server.csv", "earn", "acq", "crude", rows=24)


@pytest.fixture
def config(source: Path) -> str:
    return CONFIG.format(model="tiny", source=source)


def prepared(config: str) -> Prepared:
    return prepare(config_from_text(config, "test"), Silent())


def terms_of_server(config: str) -> Terms:
    return Terms.from_json(server_for(prepared(config), Keeper(None), Silent()).terms)


def trouble(reply: Message) -> str:
    assert not reply.has_error()
    with pytest.raises(TroubleError) as caught:
        checks.trouble(reply)
    return str(caught.value)


def test_labels_have_the_same_numbers_and_tokens_on_every_node(config: str, tmp_path: Path) -> None:
    terms = terms_of_server(config)
    assert (terms.kind, terms.labels, terms.first_token_only) == ("classification", ("acq", "crude", "earn"), True)
    reference = prepared(config)
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for number, labels in enumerate((("earn", "acq"), ("acq", "crude"), ("crude",))):
        own = rows_file(tmp_path / f"{number}.csv", *labels, rows=5)
        node = Node(config, number, {"data": str(own)})
        reply = node.describe(terms)
        assert facts_of(reply)["examples"] == 5  # too few to keep some back
        device = node.device()
        assert device.encoder.first_token_only
        for example in device.examples:
            label = next(label for label in labels if label == example.choices[example.answer])
            (batch,) = device.encoder.training_batch([example]).choice_tokens.tolist()  # type: ignore[union-attr]
            seen.setdefault(label, set()).add((example.answer, *batch))
    for label, found in seen.items():
        same = next(row for row in reference.task.train if row.choices[row.answer] == label)
        (batch,) = reference.encoder.training_batch([same]).choice_tokens.tolist()  # type: ignore[union-attr]
        assert found == {(same.answer, *batch)}


def test_a_row_in_a_message_would_be_found(tmp_path: Path) -> None:
    own = rows_file(tmp_path / "own.csv", "earn")
    text = own.read_text().splitlines()[2].partition(",")[0]
    for said, found in ((text, True), (own.name, True), ("nothing", False)):
        told = request("train", RecordDict({"facts": ConfigRecord({"words": f"no: {said}"})}))
        with pytest.raises(AssertionError) if found else contextlib.nullcontext():
            check_holds_no_row(told, own)


def test_one_row_is_enough(config: str, tmp_path: Path) -> None:
    node = Node(config, 1, {"data": str(rows_file(tmp_path / "one.csv", "crude", rows=1))})
    assert facts_of(node.describe(terms_of_server(config)))["examples"] == 1


def test_rows_that_do_not_fit_are_refused_with_a_code_only(
    config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    terms = terms_of_server(config)
    strange = rows_file(tmp_path / "secret-ward.csv", "earn", "leukaemia", rows=6)
    with caplog.at_level(logging.ERROR):
        reply = Node(config, 0, {"data": str(strange)}).describe(terms)
    assert trouble(reply) == "its own rows do not fit the run; its log says which"
    assert "leukaemia" in caplog.text
    assert "line 3" in caplog.text
    # Not even how many: with labels of its choice a server could ask who is among the rows.
    other = Node(config, 0, {"data": str(rows_file(tmp_path / "b.csv", "leukaemia", rows=5))}).describe(terms)
    assert dict(facts_of(other)) == dict(facts_of(reply))
    for told in (str(facts_of(reply)), str(reply.content)):
        assert "leukaemia" not in told
        assert "secret-ward" not in told


@pytest.mark.parametrize(
    "content",
    ['{"prompt": "Water boils at", "choices": ["50", "100"], "answer": 1}\n', '{"prompt": "a", "completion": "b"}\n'],
)
def test_a_file_of_another_kind_trains_no_other_task(config: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "own.jsonl").write_text(content)
    reply = Node(config, 0, {"data": str(tmp_path / "own.jsonl")}).describe(terms_of_server(config))
    assert "its own rows do not fit the run" in trouble(reply)


def test_the_kind_of_the_run_decides_where_columns_fit_two(config: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label,completion\nprofit,earn,later\noil,crude,\n")
    node = Node(config, 0, {"data": str(tmp_path / "own.csv")})
    assert facts_of(node.describe(terms_of_server(config)))["examples"] == 2


def test_how_a_file_is_written_is_a_matter_of_its_device(config: str, source: Path, tmp_path: Path) -> None:
    """The run's own encoding and delimiter are those of the server's file."""
    text = "text;label\nprofit for the caf\u00e9;earn\n"
    source.write_text(source.read_text().replace(",", ";") + "caf\u00e9;earn\n", encoding="cp1252")
    run = config.replace("[data]\n", '[data]\nencoding = "cp1252"\ndelimiter = ";"\n')
    terms = terms_of_server(run)
    (tmp_path / "utf8.csv").write_text(text.replace(";", ","), encoding="utf-8")
    (tmp_path / "latin.csv").write_text(text, encoding="cp1252")
    for settings in (
        {"data": str(tmp_path / "utf8.csv")},
        {"data": str(tmp_path / "latin.csv"), "encoding": "cp1252", "delimiter": ";"},
    ):
        node = Node(run, 0, dict(settings))
        node.describe(terms)
        assert [example.text for example in node.device().examples] == ["profit for the caf\u00e9"]
    bad = Node(run, 0, {"data": str(tmp_path / "utf8.csv"), "encoding": "hex"}).describe(terms)
    assert trouble(bad) == "cannot take part with its settings, model or data; its log says why"


def test_a_file_that_was_corrected_is_read_again(config: str, tmp_path: Path) -> None:
    terms = terms_of_server(config)
    path = rows_file(tmp_path / "own.csv", "earn", "leukaemia")
    node = Node(config, 0, {"data": str(path)})
    trouble(node.describe(terms))
    rows_file(path, "earn", "crude", rows=4)
    assert facts_of(node.describe(terms))["examples"] == 4
    rows_file(path, "earn", rows=2)
    assert facts_of(node.describe(terms))["examples"] == 2


def test_a_server_does_not_choose_the_files_that_a_device_opens(config: str, source: Path, tmp_path: Path) -> None:
    terms = terms_of_server(config)
    found = Node(config, 0).describe(terms)
    missing = Node(config.replace(str(source), str(tmp_path / "none.csv")), 0).describe(terms)
    assert trouble(found) == trouble(missing) == "cannot take part with its settings, model or data; its log says why"
    allowed = Node(config, 0, {"shared-data": True}).describe(terms)
    assert facts_of(allowed)["examples"] > 1
    packaged = config.replace(str(source), "reuters-r8")
    assert facts_of(Node(packaged, 0).describe(terms_of_server(packaged)))["examples"] > 1


def test_a_file_of_a_named_set_is_read_as_rows_of_that_set(tmp_path: Path) -> None:
    """AG News numbers its labels 0 to 3; a node must not learn to say "0"."""
    terms = Terms("ag-news", "classification", ("Business", "Sci/Tech", "Sports", "World"), True)
    words = '{ Business = "bank", "Sci/Tech" = "oil", Sports = "ship", World = "trade" }'  # the tiny model knows them
    config = CONFIG.format(model="tiny", source="ag-news").replace("test_rows = 4", f"label_words = {words}")
    node = Node(config, 0, {"data": str(rows_file(tmp_path / "own.csv", "0", "3", rows=4))})
    node.describe(terms)
    device = node.device()
    assert [example.choices[example.answer] for example in device.examples] == ["trade", "oil"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": "classification"}',
        '{"format": "x", "kind": "classification", "labels": ["a"], "first_token_only": true}',
        '{"format": "choices", "kind": "guess", "labels": [], "first_token_only": true}',
        '{"format": "classification", "kind": "classification", "labels": ["a", "a"], "first_token_only": true}',
        '{"format": "classification", "kind": "classification", "labels": [1], "first_token_only": true}',
    ],
)
def test_terms_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"terms|labels|label|Expecting"):
        Terms.from_json(text)


def asked_to_train(config: str, plan: Message, ready: Prepared) -> Any:
    resident = unpack_bits(facts_of(plan)["resident"], ready.model.num_experts)
    return train_request(1, resident, pack(ready.initial, resident))


def test_one_process_that_serves_two_clients_gives_each_what_a_process_of_its_own_would(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for part in (tiny_model(len(tokenizer), 0), tokenizer):
        part.save_pretrained(tmp_path / "model")
    source = rows_file(tmp_path / "server.csv", "earn", "acq", "crude", rows=48)
    for model in (tmp_path / "model", "tiny"):  # carved from a checkpoint, and masked
        config = CONFIG.format(model=model, source=source)
        ready = prepared(config)
        terms = Terms.from_json(server_for(ready, Keeper(None), Silent()).terms)

        def round_of(node: Node, config: str = config, ready: Prepared = ready, terms: Terms = terms) -> Any:
            node.describe(terms)
            plan = node.plan()
            return facts_of(plan)["resident"], tensors_of(node.train(asked_to_train(config, plan, ready)))

        deployment._prepared.cache_clear()
        alone = round_of(Node(config, 1, dict(SHARED)))
        deployment._prepared.cache_clear()
        round_of(Node(config, 0, dict(SHARED)))
        after = round_of(Node(config, 1, dict(SHARED)))
        assert after[0] == alone[0]
        assert set(after[1]) == set(alone[1])
        assert all(torch.equal(tensor, alone[1][name]) for name, tensor in after[1].items())


def test_a_device_measures_rows_of_its_own_that_it_never_trained_on(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for part in (tiny_model(len(tokenizer), 0), tokenizer):
        part.save_pretrained(tmp_path / "model")
    source = rows_file(tmp_path / "server.csv", "earn", "acq", "crude", rows=24)
    own = rows_file(tmp_path / "own.csv", "earn", "acq", rows=60)
    deployment._prepared.cache_clear()
    told = []
    for model in (tmp_path / "model", "tiny"):  # carved from a checkpoint, and masked
        config = CONFIG.format(model=model, source=source).replace("[evaluation]", "[evaluation]\nown_share = 0.2")
        ready = prepared(config)
        terms = Terms.from_json(server_for(ready, Keeper(None), Silent()).terms)
        node = Node(config, 1, {"data": str(own)})
        assert facts_of(node.describe(terms))["examples"] == 48
        content = asked_to_train(config, node.plan(), ready)
        assert trouble(node.measure(content)) == "refuses what the server asked; its log says why"  # not trained yet
        assert "status" not in facts_of(node.train(content))
        device = node.device()
        resident = unpack_bits(content.config_records["facts"]["resident"], ready.model.num_experts)
        lifted = pack({name: tensor + 0.05 for name, tensor in ready.initial.items()}, resident)
        reply = node.measure(train_request(1, resident, lifted))
        result = checks.own_result(reply, 50, choices=True)
        assert (result.trained_rows, result.own_rows) == (48, 12)
        assert result.loss_before != result.loss_after
        assert set(facts_of(reply)) == {field.name for field in fields(result)}
        assert {row.origin for row in device.examples}.isdisjoint({row.origin for row in device.kept})
        told.append(result)
        assert trouble(node.measure(content))  # one model is enough
        assert dict(facts_of(node.measure(train_request(1, resident, lifted)))) == dict(facts_of(reply))
        quiet = Node(config, 1, {"data": str(own), "measure": False})
        assert facts_of(quiet.describe(terms))["examples"] == 60
        quiet.plan()
        quiet.train(content)
        assert checks.own_result(quiet.measure(content), 50, choices=True).own_rows == 0
    carved, masked = told
    assert carved.right_before == masked.right_before
    assert carved.loss_before == pytest.approx(masked.loss_before, abs=1e-5)
    assert carved.loss_after == pytest.approx(masked.loss_after, abs=1e-5)


def test_a_plan_opens_no_model_where_scores_are_known(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, node = prepared(config), Node(config, 0, dict(SHARED))
    node.describe(Terms.from_json(server_for(ready, Keeper(None), Silent()).terms))
    first = node.plan()
    node.train(asked_to_train(config, first, ready))
    opened = node.device().place  # what the model itself would say
    monkeypatch.setattr(deployment, "prepare", lambda *_, **__: pytest.fail("the model was opened"))
    deployment._prepared.cache_clear()
    reply = node.plan(2)
    resident = unpack_bits(facts_of(reply)["resident"], ready.model.num_experts)
    assert sum(int(keep.sum()) for keep in resident) == opened.budget == 16


def test_what_a_server_asks_is_checked_before_it_is_done(config: str) -> None:
    ready, node = prepared(config), Node(config, 0, dict(SHARED))
    node.describe(Terms.from_json(server_for(ready, Keeper(None), Silent()).terms))
    honest = asked_to_train(config, node.plan(), ready)
    everything = [torch.ones(8, dtype=torch.bool)] * 4
    nothing = [torch.tensor([True, *[False] * 7])] * 4
    half = [torch.tensor([True, False] * 4)] * 4
    broken = {name: tensor * torch.nan for name, tensor in pack(ready.initial, half).items()}
    asked = {
        "more than its room": train_request(1, everything, pack(ready.initial, everything)),
        "fewer than top-k": train_request(1, nothing, pack(ready.initial, nothing)),
        "not finite": train_request(1, half, broken),
        "missing tensors": train_request(1, half, {}),
        "no round": train_request(99, half, pack(ready.initial, half)),
    }
    for what, content in asked.items():
        assert trouble(node.train(content)) == "refuses what the server asked; its log says why", what
    assert "status" not in facts_of(node.train(honest))


def test_settings_that_ask_for_too_much_are_refused(config: str) -> None:
    greedy = config.replace("steps = 2", "steps = 1000000000")
    with pytest.raises(requests.InvalidRequestError, match=r"train.steps = 1000000000 is more than 100000"):
        requests.check_settings(config_from_text(greedy, "test"))
    reply = Node(greedy, 0).describe(terms_of_server(config))
    assert trouble(reply) == "refuses what the server asked; its log says why"


def test_a_server_of_another_version_is_refused_by_name(config: str, caplog: pytest.LogCaptureFixture) -> None:
    reply = Node(config, settings=SHARED).ask(DESCRIBE, record({"version": "0.0.9", "terms": "{}"}))
    with pytest.raises(TroubleError, match="has another version of hfedmoe; its log says which"):
        checks.trouble(reply)
    assert "the server has another version of hfedmoe: 0.0.9; this device has" in caplog.text


def test_another_base_model_or_tokenizer_is_refused_by_name_on_both_sides(
    config: str, caplog: pytest.LogCaptureFixture
) -> None:
    ready, terms = prepared(config), terms_of_server(config)
    same = Digests(base_digest(ready.config), tokenizer_digest(ready.encoder.tokenizer))
    node = Node(config, 0, dict(SHARED))
    about = checks.description(node.describe(terms, same), ready.model.num_experts, same)
    assert about.digests == same
    assert "the server's base" not in caplog.text
    for other, told, said in (
        (replace(same, base="0" * 32), "its base model is not the server's", "tiny: its weights are not the server's"),
        (replace(same, tokenizer="0" * 32), "its tokenizer is not the server's", "tiny: its tokenizer is not the"),
    ):
        assert trouble(node.describe(terms, other)).startswith(told)
        assert said in caplog.text
        with pytest.raises(InvalidReplyError, match=told):  # nor does the server take its word
            checks.description(node.describe(terms), ready.model.num_experts, other)


def test_the_words_of_a_fault_stay_on_the_device(
    config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError('got "Patient 17"')

    deployment._prepared.cache_clear()
    monkeypatch.setattr(deployment, "prepare", broken)
    terms = Terms("classification", "classification", ("acq", "earn"), True)
    with caplog.at_level(logging.ERROR):
        reply = Node(config, 0, dict(SHARED)).describe(terms)
    assert trouble(reply) == "failed; its log says why"
    assert "Patient" not in str(reply.content)
    assert "Patient 17" in caplog.text
