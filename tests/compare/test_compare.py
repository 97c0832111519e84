"""Cells in processes of their own, kept and not computed twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hfedmoe.cli import main
from hfedmoe.compare.cells import Result
from hfedmoe.compare.comparing import Comparison, compare
from hfedmoe.compare.computing import cells_of
from hfedmoe.compare.grid import Point
from hfedmoe.compare.rows import rows_of
from hfedmoe.compare.stored import Stored
from hfedmoe.config import RunConfig
from hfedmoe.errors import UserError
from hfedmoe.events import Silent
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.settings import config_toml
from hfedmoe.simulation import run
from tests.federation import tiny_config

_BITS = {"held": "resident", "trained": "trained"}
"""Names of the counts in the run folder."""
QUICK = ("federation.rounds=2", "train.steps=1")


@pytest.fixture(scope="module")
def settings() -> RunConfig:
    return tiny_config(*QUICK)


@pytest.fixture(scope="module")
def folder(settings: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    compare([Point(settings)], Comparison("hfedmoe,local", "0-1", out, 2))
    return out


def test_a_cell_is_the_run_with_that_method_and_seed(folder: Path, settings: RunConfig, tmp_path: Path) -> None:
    (cell,) = cells_of(settings, rows_of("hfedmoe"), [1])
    found = Result.read(folder / "cells" / cell.file)
    assert (found.method, found.seed, found.digest, found.personal) == ("hfedmoe", 1, cell.digest, False)
    # A comparison measures clients in its own way; they keep no rows back.
    evaluation = cell.config.evaluation.model_copy(update={"own_share": 0.0})
    run(cell.config.model_copy(update={"evaluation": evaluation}), tmp_path / "run", Silent())
    lines = RunFolder.open(tmp_path / "run").read_rounds()
    assert [line.accuracy for line in found.rounds] == [line["evaluation"]["all"]["accuracy"] for line in lines]
    assert [line.bytes_up for line in found.rounds[1:]] == [line["bytes_up"] for line in lines[1:]]
    assert [line.clients for line in found.rounds] == [0, 4, 4]
    assert sum(found.client_rows) == 160
    assert len(found.client_accuracy) == len(found.client_accuracy_prior) == 4
    watched = [line["evaluation"].get("watch", {}).get("accuracy") for line in lines]
    assert [line.watch_accuracy for line in found.rounds] == watched
    assert (found.test_rows, found.watch_rows) == (30, 6)
    rows = RunFolder.open(tmp_path / "run").read_expert_rows()
    assert rows is not None
    for kind in ("held", "trained"):
        counts = [sum(row[_BITS[kind]].reshape(-1).astype(int) for row in rows if row["client"] == c) for c in range(4)]
        assert getattr(found, kind) == [own.tolist() for own in counts]
    assert found.machine["threads"] == 1
    assert found.peak_bytes > 1 << 27
    # Four layers, top-2: each token counts 8 pairs of an expert with 64 x 96 x 3 weights.
    tokens = sum(row["tokens"] for row in lines[1]["clients"])
    experts = 4 * 3 * 64 * 96 * tokens
    assert experts < found.rounds[1].flops < 6 * experts


def test_a_cell_answers_for_later_versions_with_the_same_settings(folder: Path, settings: RunConfig) -> None:
    (cell,) = cells_of(settings, rows_of("hfedmoe"), [1])
    found = Result.read(folder / "cells" / cell.file)

    def answers(train: dict[str, object]) -> bool:
        stored = Stored()
        stored.add(replace(found, config=found.config | {"train": train}))
        return bool(stored.of(cell))

    train = found.config["train"]
    assert answers(train)
    assert not answers(train | {"rank": cell.config.train.rank + 1})  # as after a change of the default
    # As from a version that did not have the setting, and from one that had another, at its default.
    assert answers({key: value for key, value in train.items() if key != "gradient_checkpointing"})
    assert answers(train | {"gone": 1})


def test_clients_with_models_of_their_own_are_measured_one_by_one(folder: Path) -> None:
    found = [Result.read(path) for path in sorted((folder / "cells").glob("local-*"))]
    assert len(found) == 2
    for result in found:
        assert result.personal
        assert [line.accuracy is None for line in result.rounds] == [False, False, False]
        assert [line.macro_f1 is None for line in result.rounds] == [False, True, False]
        assert [line.bytes_up < 10_000 for line in result.rounds[1:]] == [True, True]


def test_what_is_computed_is_kept_and_what_is_missing_is_computed(folder: Path, settings: RunConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    gone = next(path for path in before if path.name.startswith("local-seed0"))
    content = Result.read(gone)
    gone.unlink()
    text = compare([Point(settings)], Comparison("hfedmoe,local", "0-1", folder, 1, 0.5))
    after = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert {path for path in after if after[path] != before[path]} == {gone}
    again = Result.read(gone)
    assert [line.accuracy for line in again.rounds] == [line.accuracy for line in content.rounds]
    assert "| `local` |" in text
    assert "Target accuracy: 50.0%" in text
    assert (folder / "table.md").read_text(encoding="utf-8") in text
    figures = {*(f"accuracy-over-{x}.svg" for x in ("rounds", "bytes", "flops")), "experts.svg"}
    assert {path.name for path in folder.glob("*.svg")} == figures


def test_tables_of_stored_cells_need_no_computing(
    folder: Path, settings: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, other, out = tmp_path / "my.toml", tmp_path / "other machine", tmp_path / "out"
    config.write_text(config_toml(settings), encoding="utf-8")
    other.mkdir()
    for path in (folder / "cells").glob("hfedmoe-*"):
        found = Result.read(path)
        changed = found.config | {"train": found.config["train"] | {"lr": 0.5}}
        replace(found, config=changed, machine=found.machine | {"processor": "abacus"}).write(other / path.name)
    request = ["compare", str(config), "--methods", "hfedmoe,local", "--seeds", "0-1", "--out", str(out)]
    request += ["--only-stored", "--from", str(folder), "--from", str(other)]
    with pytest.raises(SystemExit) as ended:
        main([*request, "--vary", f"train.lr=0.5|{settings.train.lr}", "--on", "validation"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "Accuracies are on the 6 validation rows" in text
    first, second = text.split("## train.lr = ")[1:]
    assert "Without stored figures: local 0, local 1." in first
    assert "Without stored" not in second
    assert "abacus, 1 thread(s)" in text
    assert {path.name for path in out.glob("*.svg")} == {
        *(f"accuracy-over-{x}.svg" for x in ("rounds", "bytes", "flops")),
        *("accuracy-against-train-lr.svg", "experts-1.svg", "experts-2.svg"),
    }
    assert not list((out / "cells").iterdir())
    with pytest.raises(SystemExit) as ended:
        main([*request, "--set", "train.lr=0.25"])
    assert ended.value.code == 2
    assert "error: --only-stored: none of the cells is stored in" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--from nowhere: no such folder"):
        compare([Point(settings)], Comparison("hfedmoe", "0", out, sources=[Path("nowhere")], only_stored=True))


def test_settings_are_not_chosen_on_figures_that_a_cell_lacks(
    folder: Path, settings: RunConfig, tmp_path: Path
) -> None:
    (cell,) = cells_of(settings, rows_of("local"), [0])
    found = Result.read(folder / "cells" / cell.file)
    (tmp_path / "cells").mkdir()
    replace(found, watch_rows=0).write(tmp_path / "cells" / cell.file)  # as from a version that measured another model
    with pytest.raises(UserError, match=r"--on validation: local 0: no figures on validation rows"):
        compare([Point(settings)], Comparison("local", "0", tmp_path, on="validation"))


def test_another_setting_is_another_cell(settings: RunConfig) -> None:
    (one,), (other,) = (
        cells_of(config, rows_of("hfedmoe"), [0]) for config in (settings, tiny_config(*QUICK, "train.lr=1e-4"))
    )
    assert one.file != other.file
    (named,) = cells_of(settings.model_copy(update={"name": "another"}), rows_of("hfedmoe"), [0])
    assert named.file == one.file
    with_option = tiny_config(*QUICK, "method.name=fedprox", "method.options.mu=0.5")
    prox, plain = cells_of(with_option, rows_of("fedprox,fedavg"), [0])
    assert prox.config.method.options == {"mu": 0.5}
    assert plain.config.method.options == {}


def test_a_cell_that_cannot_be_computed_does_not_stop_the_others(
    folder: Path, settings: RunConfig, tmp_path: Path
) -> None:
    small = settings.model_copy(update={"clients": settings.clients.model_copy(update={"budgets": ["25%"]})})
    request = Comparison("fedavg,random", "0-1", tmp_path, 2)
    with pytest.raises(
        UserError, match=r"tables and figures of the others; fedavg with seed 0, fedavg with seed 1: round 1: 0 valid"
    ):
        compare([Point(small)], request)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| `random` |" in table
    assert "Without stored figures: fedavg 0, fedavg 1." in table
    assert sorted(path.name[:12] for path in (tmp_path / "cells").iterdir()) == ["random-seed0", "random-seed1"]


def test_bad_requests_are_one_line(folder: Path, settings: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fedsgd is no method; `hfedmoe methods`"):
        compare([Point(settings)], Comparison("hfedmoe,fedsgd", "0", tmp_path, 1))
    for seeds in ("", "a", "3-1", "1-"):
        with pytest.raises(UserError, match=r"--seeds .*: expected numbers"):
            compare([Point(settings)], Comparison("hfedmoe", seeds, tmp_path, 1))
    broken = tiny_config(*QUICK, "train.lr=1e30")
    with pytest.raises(UserError, match=r"no cell can be computed; hfedmoe with seed 0: round 1: 0 valid updates"):
        compare([Point(broken)], Comparison("hfedmoe", "0", tmp_path, 1))
    path = next((folder / "cells").iterdir())
    tree = json.loads(path.read_text())
    for damaged in ("{", json.dumps(tree | {"format": 99}), "[]"):
        (tmp_path / "x.json").write_text(damaged)
        with pytest.raises(UserError, match="is not the result of a cell"):
            Result.read(tmp_path / "x.json")


def test_a_limit_without_budgets_is_one_cell_for_all_budgets() -> None:
    small, large = (tiny_config(f'clients.budgets=["{share}%"]') for share in (25, 50))
    for name in ("unlimited", "pooled", "hfedmoe", "local", "flame", "hetlora"):
        ((one,), (other,)) = (cells_of(config, rows_of(name), [0]) for config in (small, large))
        assert (one.file == other.file) is (name in ("unlimited", "pooled"))
