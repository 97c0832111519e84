"""What did each site gain: rows that nobody trained on, before, after and alone, from the run to its records."""

import json
import math
from pathlib import Path

import pytest

from hfedmoe import simulation
from hfedmoe.config import EvaluationConfig
from hfedmoe.data.example import Example
from hfedmoe.data.kept import MOST_CLIENTS, class_counts, keep_back, kept_by
from hfedmoe.data.sites import site_names
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError
from hfedmoe.events import ClientTotals, Evaluation, Personal, Score, Silent, SiteGain
from hfedmoe.prepare import Prepared
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.identity import NAME, read_identity
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.intervals import difference_interval, share_interval
from tests.deployment.nodes import rows_file
from tests.federation import tiny_config


class Seen(Silent):
    """Remembers what is shown at the end, and the notes."""

    def __init__(self) -> None:
        self.gains: list[SiteGain] = []
        self.names: list[str] = []
        self.notes: list[str] = []
        self.personal_found: list[tuple[int, list[Personal]]] = []

    def personal(self, round: int, found: list[Personal]) -> None:  # type: ignore[override]
        self.personal_found.append((round, found))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def final_table(self, clients: list[ClientTotals], before: Evaluation | None, after: Evaluation | None) -> None:  # type: ignore[override]
        self.names = [line.name for line in clients]

    def site_gains(self, gains: list[SiteGain]) -> None:  # type: ignore[override]
        self.gains = list(gains)


def files(folder: Path) -> str:
    """Three files of sites; the last lacks a class."""
    rows_file(folder / "north.csv", "earn", "acq", rows=120)
    rows_file(folder / "south.csv", "acq", "earn", rows=80)
    rows_file(folder / "west.csv", "earn", "earn", rows=60)
    return json.dumps([str(folder / f"{name}.csv") for name in ("north", "south", "west")])


def settings(folder: Path, *more: str) -> list[str]:
    return [
        f"data.clients={files(folder)}",
        "clients.count=3",
        "data.train_rows=300",
        "partition.min_rows=1",
        "train.steps=3",
        "train.lr=1e-2",
        "evaluation.own_share=0.2",
        *more,
    ]


def test_every_run_ends_with_what_each_site_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[set[str]] = []
    split = simulation.assemble

    def assemble(prepared: Prepared, parts: list[list[int]], *rest: object, **named: object) -> simulation.Simulation:
        trained.append({prepared.task.train[row].text for part in parts for row in part})
        return split(prepared, parts, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(simulation, "assemble", assemble)
    seen = Seen()
    folder = simulation.run(tiny_config(*settings(tmp_path, "evaluation.alone=true")), tmp_path / "run", seen)
    assert seen.names == [gain.name for gain in seen.gains] == ["north", "south", "west"]
    assert any("evaluation.alone: after the run the 3 sites train again" in note for note in seen.notes)
    for gain, rows, classes in zip(seen.gains, (108, 72, 54), (2, 2, 1), strict=True):
        assert gain.trained_rows + gain.own_rows == rows == sum(gain.labels.values())
        assert gain.own_rows == round(0.2 * rows)
        assert (len(gain.labels), gain.num_labels) == (classes, 2)
        assert gain.alone is not None
        for score in (gain.before, gain.alone, gain.federated):
            low, high = score.interval or (1.0, 0.0)
            assert score.accuracy is not None
            assert low <= score.accuracy <= high
            assert score.macro_f1 is not None
        assert gain.gain == pytest.approx(gain.federated.accuracy - gain.alone.accuracy)  # type: ignore[operator]
        assert gain.federated.loss < gain.before.loss
        assert gain.alone.loss < gain.before.loss
    # Both trainings saw the same rows, and none that was kept back.
    assert len(trained) == 2
    assert trained[0] == trained[1]
    run = RunFolder.open(folder)
    lines = run.read_rounds()
    assert [SiteGain.from_json(entry) for entry in lines[-1]["sites"]] == seen.gains
    assert all("sites" not in line for line in lines[:-1])
    assert read_identity(folder).own_rows == sum(gain.own_rows for gain in seen.gains)  # type: ignore[union-attr]


def test_the_federated_model_is_the_one_that_is_saved_and_alone_is_local(tmp_path: Path) -> None:
    seen = Seen()
    config = tiny_config(*settings(tmp_path, "evaluation.alone=true", "federation.rounds=1"))
    folder = simulation.run(config, tmp_path / "run", seen)
    local = Seen()
    changed = config.model_copy(update={"method": config.method.model_copy(update={"name": "local"})})
    simulation.run(changed, tmp_path / "local", local)
    for one, other in zip(seen.gains, local.gains, strict=True):
        assert one.alone == other.federated == other.alone
        assert one.before == other.before
    assert any(one.federated != one.alone for one in seen.gains)
    # A finished run shows the same again, without measuring.
    again = Seen()
    simulation.resume(folder, again)
    assert again.gains == seen.gains
    # A run that was stopped between its last round and the table measures it then.
    run = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in run.read_text().splitlines()]
    del lines[-1]["sites"]
    run.write_text("".join(json.dumps(line) + "\n" for line in lines))
    simulation.resume(folder, again)
    assert again.gains == seen.gains
    # A run of an earlier version trained on all its rows: none can be measured.
    identity = json.loads((folder / NAME).read_text())
    del identity["own_rows"]
    (folder / NAME).write_text(json.dumps(identity))
    run.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again.gains = []
    simulation.resume(folder, again)
    assert again.gains == []


@pytest.mark.parametrize("method", ["pooled", "unlimited"])
def test_sites_without_limits_have_none_alone(tmp_path: Path, method: str) -> None:
    seen = Seen()
    more = (f"method.name={method}", "evaluation.alone=true", "federation.rounds=1", 'clients.budgets=["4GiB"]')
    simulation.run(tiny_config(*settings(tmp_path, *more)), tmp_path / "run", seen)
    assert [gain.name for gain in seen.gains] == ["north", "south", "west"]
    assert all(gain.alone is not None and gain.alone.loss < gain.before.loss for gain in seen.gains)


def test_alone_is_refused_where_clients_train_other_parts() -> None:
    for name in ("flex", "pfl_moe", "flame"):
        with pytest.raises(UserError, match=r"evaluation\.alone: a client of the method"):
            tiny_config(f"method.name={name}", "evaluation.alone=true")


def test_tasks_without_choices_are_measured_by_their_loss(tmp_path: Path) -> None:
    rows = [{"prompt": f"the bank said {n}", "completion": "oil prices rose"} for n in range(140)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = (
        f"data.source={tmp_path}/rows.jsonl",
        "partition.scheme=iid",
        "federation.rounds=1",
        "clients.count=2",
        "evaluation.own_share=0.1",
    )
    seen = Seen()
    simulation.run(tiny_config(*own), tmp_path / "run", seen)
    assert [gain.name for gain in seen.gains] == ["client 0", "client 1"]
    for gain in seen.gains:
        assert (gain.federated.accuracy, gain.gain, gain.labels) == (None, None, {})
        assert gain.federated.loss < gain.before.loss


def task(texts: int, **more: object) -> Task:
    rows = [Example(f"text {n}", ("a", "b"), n % 2, origin=f"row {n}") for n in range(texts)]
    return Task("t", "classification", "{text}", ("a", "b"), rows, [], **more)  # type: ignore[arg-type]


def test_rows_are_kept_back_once_and_by_nobody_else_s_rows() -> None:
    config = EvaluationConfig(own_share=0.125, own_rows=16)
    parts = [list(range(40)), list(range(40, 79)), list(range(80, 184)), list(range(200, 400))]
    trained, kept = keep_back(task(400), parts, config, seed=0)
    assert [len(part) for part in kept] == [10, 0, 13, 16]  # at least ten, too few, an eighth, at most 16
    assert [sorted(a + b) for a, b in zip(trained, kept, strict=True)] == parts
    again, _ = keep_back(task(400), [parts[0], [], parts[2], [20, 21]], config, seed=0)
    assert (again[0], again[1]) == (trained[0], [])
    assert keep_back(task(400), parts, config, seed=1)[1] != kept
    assert kept_by(task(400), parts[2], 2, 4, config, seed=0) == (trained[2], kept[2])
    assert keep_back(task(400), parts, EvaluationConfig(own_share=0), seed=0) == (parts, [[]] * 4)
    many = [list(range(40)) for _ in range(MOST_CLIENTS + 1)]
    assert keep_back(task(40), many, config, seed=0)[1] == [[]] * len(many)
    assert class_counts(task(40), [0, 2, 4]) == {"a": 3}


def test_a_conversation_is_not_half_kept_back() -> None:
    rows = [
        Example("", completion="x", messages=(("user", "hi"),), origin=f"line {n // 3}") for n in range(150)
    ]  # fifty conversations of three answers
    talks = Task("t", "completion", "{text}", (), rows, [])
    trained, kept = keep_back(talks, [list(range(150))], EvaluationConfig(own_share=0.2), seed=0)
    assert len(kept[0]) == 30
    assert {row // 3 for row in kept[0]}.isdisjoint({row // 3 for row in trained[0]})


def test_sites_have_the_names_of_their_files_or_ids() -> None:
    from hfedmoe.config import DataConfig

    def names(given: list[str], clients: bool = True) -> list[str]:
        config = DataConfig(clients=given if clients else None)
        return site_names(task(2, parts=[[0], [1]], part_names=given), config, len(given))

    assert names(["/x/north.csv", "/x/south.jsonl.gz"]) == ["north", "south"]
    assert names(["/a/rows.csv", "/b/rows.csv"]) == ["a/rows", "b/rows"]
    assert names(["/a/b/rows.csv", "/c/b/rows.csv"]) == ["b/rows (0)", "b/rows (1)"]
    assert names(["Ann", "bad\nname"], clients=False) == ["Ann", "bad name"]
    assert len(names(["x" * 200, "y"], clients=False)[0]) == 80
    assert site_names(task(2), DataConfig(), 2) == ["client 0", "client 1"]


def test_intervals_are_the_published_ones() -> None:
    assert share_interval(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)  # Wilson (1927), as in textbooks
    low, high = share_interval(0, 12)
    assert low == pytest.approx(0, abs=1e-12)
    assert 0.2 < high < 0.3  # twelve rows decide nothing
    # By hand: (6 - 2) / 12 = 0.3333, and 1.96 sqrt((0.6667 - 0.1111) / 12) = 0.4217.
    assert difference_interval(5, 1, 10) == pytest.approx((-0.0884, 0.7551), abs=5e-4)
    assert difference_interval(0, 0, 10)[1] > 0.2
    assert math.isclose(sum(difference_interval(3, 3, 20)), 0, abs_tol=1e-12)


def test_a_score_without_choices_has_no_interval() -> None:
    entry = SiteGain(0, "a", 1, 1, {}, 0, Score(None, None, 2.0), Score(None, None, 1.0))
    assert SiteGain.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    assert Metrics(None, None, 1.0, 1, 1.0).predicted is None
