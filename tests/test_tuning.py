"""Clients that train on for themselves after the last round: what stays the same, what is kept, and its export."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfedmoe import simulation
from hfedmoe.client.tuning import Tuned
from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Personal, SiteGain
from hfedmoe.prepare import prepare
from hfedmoe.report.live.gains import explained, gains_table
from hfedmoe.report.page.page import one_page
from hfedmoe.report.page.story import read_story
from hfedmoe.report.personal import personal_line
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.evaluation import evaluate
from hfedmoe.server.recall import last_held
from hfedmoe.simulated import split
from tests.commands import hfedmoe
from tests.federation import tiny_config
from tests.test_carriers import without
from tests.test_gains import Seen, settings

STEPS = 5


@dataclass
class Runs:
    config: RunConfig
    folder: Path
    """A run whose clients train on for themselves; the last of three holds every expert."""
    plain: Path
    """The same without that."""
    seen: Seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root, seen = tmp_path_factory.mktemp("tuning"), Seen()
    more = settings(root, "federation.rounds=1")
    config = tiny_config(*more, f"evaluation.tune_steps={STEPS}", "evaluation.personal_every=1")
    folder = simulation.run(config, root / "run", seen)
    return Runs(config, folder, simulation.run(tiny_config(*more), root / "plain", Seen()), seen)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "tuned").iterdir())}


def test_without_it_nothing_else_is_different(runs: Runs) -> None:
    assert any(f"every client that took part trains {STEPS} steps more for itself" in note for note in runs.seen.notes)
    assert any("takes about as long as 1.67 rounds of all clients" in note for note in runs.seen.notes)
    assert not (runs.plain / "tuned").exists()
    for name in ("checkpoints/round-0001/model.safetensors", "checkpoints/round-0001/clients.safetensors"):
        assert (runs.folder / name).read_bytes() == (runs.plain / name).read_bytes()
    tuned, plain = (RunFolder.open(path).read_rounds()[-1]["sites"] for path in (runs.folder, runs.plain))
    for own, other in zip(tuned, plain, strict=True):
        assert {name: value for name, value in own.items() if name != "tuning"} == other
        assert own["tuning"]["steps"] == STEPS


def test_while_it_goes_on_clients_say_how_good_the_model_is_for_them(runs: Runs) -> None:
    assert any("evaluation.personal_every: after every round its clients measure" in note for note in runs.seen.notes)
    (line, plain), shown = (RunFolder.open(path).read_rounds()[-1] for path in (runs.folder, runs.plain)), runs.seen
    found = [Personal.from_json(entry) for entry in line["personal"]]
    assert shown.personal_found == [(1, found)]
    assert "personal" not in plain
    # Nothing else is different, but that the model was sent once more.
    for key in ("accuracy", "loss", "evaluation", "clients"):
        assert without("seconds", line[key]) == without("seconds", plain[key])
    more = line["bytes_down"] - plain["bytes_down"]
    assert 0.9 < more / sum(row["bytes_down"] for row in line["clients"]) < 1
    assert [(one.client, one.name, one.own_rows) for one in found] == [
        (gain.client, gain.name, gain.own_rows) for gain in shown.gains
    ]
    for one, gain in zip(found, shown.gains, strict=True):  # the only round is the last one
        assert gain.tuning is not None
        assert gain.federated is not None
        assert gain.own is not None
        assert (one.shared_accuracy, one.shared_loss) == (gain.federated.accuracy, gain.federated.loss)
        assert (one.accuracy, one.loss) == (gain.own.accuracy, pytest.approx(gain.own.loss))
        assert one.accuracy == gain.tuning.before.accuracy
        assert one.loss == pytest.approx(gain.tuning.before.loss)
    worst, median, best = sorted(one.accuracy for one in found if one.accuracy is not None)
    said = f"clients' own rows: worst {100 * worst:.1f}, median {100 * median:.1f}, best {100 * best:.1f} %"
    assert personal_line(found) == said
    page = one_page([read_story(runs.folder)])
    assert "on rows that it kept back, after round 1:" in page
    for name, figure in (("worst", worst), ("median", median), ("best", best)):
        assert f'<div class="card">{name} client<b>{100 * figure:.1f} %</b>' in page
    assert "worst client" not in one_page([read_story(runs.plain)])


def test_each_client_s_own_experts_are_kept_and_are_what_was_measured(runs: Runs) -> None:
    prepared, run = prepare(runs.config, Seen()), RunFolder.open(runs.folder)
    sites, shared = split(prepared, keeping=True), run.load_checkpoint("last").tensors
    held, numbers = last_held(run, prepared.model.num_experts), prepared.model.num_experts
    assert [sum(int(keep.sum()) for keep in held[client]) for client in range(3)] == [8, 16, 32]
    for gain in runs.seen.gains:
        tuned = Tuned.read(run.tuned(gain.client), numbers)
        assert (tuned.client, tuned.round, tuned.steps) == (gain.client, 1, STEPS)
        assert all(torch.equal(a, b) for a, b in zip(tuned.memory.experts, held[gain.client], strict=True))
        everything = [torch.ones(number, dtype=torch.bool) for number in numbers]
        whole = tuned.memory.over(shared, everything)
        for name in (name for name in whole if name.startswith("experts.")):
            moved = (whole[name] != shared[name]).flatten(1).any(1)
            assert not bool((moved & ~held[gain.client][int(name.split(".")[1])]).any())
        assert any(not torch.equal(whole[name], shared[name]) for name in whole)
        # The sub-model as it is said: before with the shared tensors, after with the client's own.
        rows = [prepared.task.train[row] for row in sites.kept[gain.client]]
        for tensors, score in ((shared, gain.tuning.before), (whole, gain.tuning.after)):  # type: ignore[union-attr]
            prepared.measure_on(rows[:1], tensors)  # puts them in
            prepared.model.set_resident(held[gain.client])
            found = prepared.measure_now(rows)
            assert score.loss == pytest.approx(found.loss, rel=1e-5)
            assert score.accuracy == found.accuracy
        assert gain.tuning.gain == pytest.approx(gain.tuning.after.accuracy - gain.tuning.before.accuracy)  # type: ignore


def test_a_run_that_was_stopped_before_that_does_it_again_to_the_bit(runs: Runs) -> None:
    before, path = files(runs.folder), runs.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    sites = lines[-1].pop("sites")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs.folder / "tuned" / "client-1.safetensors").unlink()
    again = Seen()
    simulation.resume(runs.folder, again)
    assert files(runs.folder) == before
    assert again.gains == runs.seen.gains == [SiteGain.from_json(entry) for entry in sites]
    # A finished run shows it and trains nothing.
    (runs.folder / "tuned" / "client-1.safetensors").unlink()
    simulation.resume(runs.folder, again)
    assert again.gains == runs.seen.gains
    assert "client-1.safetensors" not in files(runs.folder)


def test_the_tables_say_what_it_gains_and_leave_it_out_where_nobody_did(runs: Runs) -> None:
    plain = [SiteGain.from_json(entry) for entry in RunFolder.open(runs.plain).read_rounds()[-1]["sites"]]
    headings = [str(column.header) for column in gains_table(runs.seen.gains).columns]
    assert headings[-2:] == ["tuned", "tuning gains (95 %)"]
    assert [str(column.header) for column in gains_table(plain).columns] == headings[:-2]
    assert f"after {STEPS} steps more for itself" in explained(runs.seen.gains)
    assert "for itself" not in explained(plain)
    with_it, without = (one_page([read_story(path)]) for path in (runs.folder, runs.plain))
    for text in ("before tuning", "tuning gains (95 %)", f"after {STEPS} steps more on its own rows"):
        assert text in with_it
        assert text not in without


def test_export_of_a_client_holds_its_own_experts(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, prepared = RunFolder.open(runs.folder), prepare(runs.config, Seen())
    export = ("export", runs.folder, "--as", "client", "--client", 2)
    assert hfedmoe(*export, tmp_path / "own") == 0
    assert f"8 experts per layer, which it trained {STEPS} steps further for itself, of round 1" in (
        capsys.readouterr().out
    )
    assert hfedmoe(*export, tmp_path / "shared", "--checkpoint", "last") == 0
    assert "for itself" not in capsys.readouterr().out
    assert json.loads((tmp_path / "own" / "experts.json").read_text())["tuned_steps"] == STEPS
    assert f"trained it {STEPS} steps further for itself" in (tmp_path / "own" / "README.md").read_text()
    # It held every expert: the plain checkpoint has the losses that the run said.
    gain, rows = runs.seen.gains[2], [prepared.task.train[row] for row in split(prepared, keeping=True).kept[2]]
    assert gain.tuning is not None
    for name, score in (("own", gain.tuning.after), ("shared", gain.tuning.before)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found = evaluate(model, rows, prepared.encoder, 32)
        assert found.loss == pytest.approx(score.loss, abs=1e-4)
    assert gain.tuning.before.loss != pytest.approx(gain.tuning.after.loss, abs=1e-3)
    # A device's file is given by name, and another's is refused.
    own = run.tuned(2)
    assert hfedmoe("export", runs.plain, tmp_path / "device", "--as", "client", "--client", 2, "--tuned", own) == 0
    device, own_model = (load_file(tmp_path / name / "model.safetensors") for name in ("device", "own"))
    assert all(torch.equal(tensor, own_model[name]) for name, tensor in device.items())
    capsys.readouterr()
    (tmp_path / "broken").write_bytes(b"x" * 20)
    for more, message in (
        (["--as", "client", "--client", 1, "--tuned", own], "is of client 2; give --client 2"),
        (["--as", "merged", "--tuned", own], "allowed only with --as client"),
        (["--as", "client", "--client", 2, "--tuned", own, "--checkpoint", "1"], "leave --checkpoint out"),
        (["--as", "client", "--client", 2, "--tuned", "gone"], "--tuned gone: no such file"),
        (["--as", "client", "--client", 2, "--tuned", tmp_path / "broken"], "not what a client trained for itself"),
    ):
        assert hfedmoe("export", runs.plain, tmp_path / "x", *more) == 2
        assert message in capsys.readouterr().err


def test_it_is_refused_where_a_client_has_no_model_of_its_own_to_keep() -> None:
    for name, words in (("pooled", "one client"), ("flux", "merged experts stand in"), ("flex", "no exported model")):
        with pytest.raises(UserError, match=rf'evaluation\.tune_steps: method.name = "{name}": .*{words}'):
            tiny_config(f"method.name={name}", "evaluation.tune_steps=2")
        with pytest.raises(UserError, match=rf'evaluation\.personal_every: method.name = "{name}": .*{words}'):
            tiny_config(f"method.name={name}", "evaluation.personal_every=2")
    for other, words in (
        ("evaluation.own_share=0", "set evaluation.own_share, or leave it out"),
        ("federation.late=fold", "clients may still train when a round ends"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_config("evaluation.personal_every=1", other)
