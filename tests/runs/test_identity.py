"""A run goes on, and is measured, only on the rows and the model that it began with, and as what it was."""

from pathlib import Path

import pytest
import torch

from hfedmoe import measure, simulation
from hfedmoe.data.example import Example
from hfedmoe.data.task import Task
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.runs.identity import DEPLOYED, SIMULATED, check_identity, identity_of, read_identity, write_identity
from tests.deployment.nodes import rows_file
from tests.federation import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on a file and a model folder of its own."""
    tokenizer = tiny_tokenizer()
    for part in (tiny_model(len(tokenizer), 0), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows_file(tmp_path / "rows.csv", "earn", "acq", rows=40)
    own = (f"data.source={tmp_path}/rows.csv", f"model.name={tmp_path}/model", "partition.scheme=iid")
    small = ("partition.min_rows=1", "federation.rounds=1", "train.steps=1", "train.batch_size=1")
    return simulation.run(tiny_config(*own, *small), tmp_path / "run", Silent())


def test_the_same_rows_and_model_are_taken(run: Path) -> None:
    simulation.resume(run, Silent())
    assert measure.evaluate_run(run, "last", Silent()).examples > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("profit", "profits"), "40 .*with other contents"),
        (lambda text: text + "oil trade,acq\n", "then, .* now"),
        (lambda text: text.replace("earn\n", "acq\n", 1), "with other contents"),
    ],
)
def test_changed_rows_stop_a_run_and_its_evaluation(run: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    rows = run.parent / "rows.csv"
    rows.write_text(change(rows.read_text()))
    for again in (lambda: simulation.resume(run, Silent()), lambda: measure.evaluate_run(run, "last", Silent())):
        with pytest.raises(UserError, match=r"its data changed since the run began") as caught:
            again()
        assert "or start a new run" in str(caught.value)


def owned(folder: Path, natural: bool, split: int) -> Task:
    """A task of two clients; the first holds `split` of the twelve training rows."""
    rows = [Example(f"oil {n}", ("acq", "earn"), n % 2) for n in range(12)]
    parts = [list(range(split)), list(range(split, 12))]
    names = ["a", "b"] if natural else [f"{folder}/a.csv", f"{folder}/b.csv"]
    return Task("rows", "classification", "{text}", ("acq", "earn"), rows, rows[:2], parts, names)


@pytest.mark.parametrize("natural", [False, True])
def test_who_holds_a_row_is_part_of_the_identity(natural: bool, tmp_path: Path) -> None:
    config = tiny_config()
    six, seven, moved = (
        identity_of(config, owned(folder, natural, split), [], SIMULATED)
        for folder, split in ((tmp_path, 6), (tmp_path, 7), (tmp_path / "moved", 6))
    )
    assert six.rows != seven.rows
    assert six == moved  # the names of files differ between machines
    (tmp_path / "run").mkdir()
    write_identity(tmp_path / "run", six)
    check_identity(tmp_path / "run", moved)
    with pytest.raises(UserError, match=r"12 training and 2 test rows then, 12 and 2 now, with .* clients"):
        check_identity(tmp_path / "run", seven)


@pytest.mark.parametrize("natural", [False, True])
def test_a_row_that_moved_to_another_client_stops_a_run(natural: bool, tmp_path: Path) -> None:
    lines = [f"profit bank {n},{'earn' if n % 2 else 'acq'}" for n in range(20)]
    test = rows_file(tmp_path / "test.csv", "earn", "acq")

    def written(first: int) -> None:
        """The first rows are a's, the others b's; their order is always the same."""
        for name, own in (("a", lines[:first]), ("b", lines[first:])):
            (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(own) + "\n")
        told = [f"{line},{'ab'[n >= first]}" for n, line in enumerate(lines)]
        (tmp_path / "rows.csv").write_text("text,label,ward\n" + "\n".join(told) + "\n")

    written(10)
    files = (f'data.clients=["{tmp_path}/a.csv", "{tmp_path}/b.csv"]',)
    column = ("partition.scheme=natural", "partition.column=ward", f"data.source={tmp_path}/rows.csv")
    small = ("partition.min_rows=1", "federation.rounds=1", "train.steps=1", "train.batch_size=1", "clients.count=2")
    settings = (*(column if natural else files), *small, f"data.test={test}")
    run = simulation.run(tiny_config(*settings), tmp_path / "run", Silent())
    simulation.resume(run, Silent())
    written(11)
    with pytest.raises(
        UserError, match=r"its data changed since the run began: .* or other clients; restore the files"
    ):
        simulation.resume(run, Silent())


def test_a_changed_base_model_stops_it_too(run: Path) -> None:
    model = tiny_model(len(tiny_tokenizer()), 0)
    model.lm_head.weight.data += torch.ones(1)
    model.save_pretrained(run.parent / "model")
    with pytest.raises(UserError, match="its base model changed since the run began"):
        simulation.resume(run, Silent())


def test_a_deployed_run_is_measured_but_not_simulated(run: Path) -> None:
    was = read_identity(run)
    assert was is not None
    write_identity(run, type(was)(**(vars(was) | {"carrier": DEPLOYED})))
    with pytest.raises(UserError, match=r"this run used real devices.*start again with `flwr run`"):
        simulation.resume(run, Silent())
    assert measure.evaluate_run(run, "last", Silent()).examples > 0


def test_a_damaged_identity_is_one_line(run: Path) -> None:
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json: is damaged"):
        simulation.resume(run, Silent())
