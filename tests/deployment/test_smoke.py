"""The same two apps under Flower, with SuperNodes on loopback or simulated ones, end with the in-process weights."""

from pathlib import Path

import pytest
import torch

from hfedmoe.config import TrackingConfig
from hfedmoe.events import Silent
from hfedmoe.models.tiny import tiny_model, tiny_tokenizer
from hfedmoe.runs.folder import RunFolder
from hfedmoe.runs.refusals import is_installed
from hfedmoe.runs.settings import run_config_toml
from hfedmoe.simulation import run
from tests.deployment.harness import deployment
from tests.federation import tiny_config
from tests.report.tracking.records import tensorboard_series

TRACKED = is_installed("tensorboard")
APP = Path(__file__).parents[2] / "examples" / "flower"


@pytest.mark.faults  # minutes: a process of torch for every message; tests/fleet has a SuperLink and lasting workers
def test_a_round_under_a_superlink_ends_with_the_in_process_weights(tmp_path: Path) -> None:
    """In process the whole model is masked; the nodes carve theirs from a checkpoint, and one says what it holds."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = tiny_config(
        f"model.name={tmp_path / 'model'}",
        "federation.rounds=1",
        "clients.count=2",
        "clients.budgets=['25%', 12]",
        "federation.min_clients=2",
        "method.bootstrap=stream",
        "evaluation.own_share=0",  # Flower starts a process for every message; the run below has those that measure
    )
    run(config, tmp_path / "inprocess", Silent())
    nodes: list[dict[str, bool | int | float | str]] = [{"partition-id": 0}, {"partition-id": 1, "budget": 12}]
    config = config.model_copy(update={"clients": config.clients.model_copy(update={"budgets": ["25%"]})})
    with deployment(APP, nodes, env={"OMP_NUM_THREADS": "1"}) as flower:
        shown = config.model_copy(update={"tracking": TrackingConfig(to=["tensorboard"] if TRACKED else [])})
        document = run_config_toml(shown).decode()
        result = flower.run({"config": document, "out": str(tmp_path / "deployed")}, timeout=400)
        assert result.exit_code == 0, result.log + "\n".join(flower.logs().values())
    check_equal(tmp_path / "inprocess", tmp_path / "deployed")
    ours, theirs = (RunFolder.open(tmp_path / name) for name in ("inprocess", "deployed"))
    if TRACKED:
        sent = theirs.read_rounds()[1]["bytes_up"]
        assert tensorboard_series(tmp_path / "deployed", "bytes/up") == [(1, sent)]
    one, other = (folder.read_rounds()[1]["clients"] for folder in (ours, theirs))
    for mine, deployed in zip(one, other, strict=True):
        assert deployed["peak_is_measured"]
        for key in ("examples", "resident", "trained", "bytes_down"):
            assert mine[key] == deployed[key], key


@pytest.mark.faults  # it takes minutes: Ray, and a process of torch for every processor
def test_a_round_in_flowers_simulation_ends_with_the_in_process_weights(tmp_path: Path) -> None:
    """Flower starts as many workers as it finds processors; each serves several of the four clients."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "hfedmoe[ray]"')
    config = tiny_config("federation.rounds=1", "federation.min_clients=4", "evaluation.tune_steps=1")
    run(config, tmp_path / "inprocess", Silent())
    with deployment(APP, [], simulated=4, env={"OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(tmp_path)}) as flower:
        document = run_config_toml(config).decode()
        result = flower.run({"config": document, "out": str(tmp_path / "simulated")}, timeout=400)
        assert result.exit_code == 0, result.log + "\n".join(flower.logs().values())
    check_equal(tmp_path / "inprocess", tmp_path / "simulated")
    # What devices trained for themselves is theirs, and what it gained is what it gains in process.
    assert not (tmp_path / "simulated" / "tuned").exists()
    own = {path.name.partition("-")[2]: path.read_bytes() for path in (tmp_path / "hfedmoe" / "tuned").iterdir()}
    assert own == {path.name: path.read_bytes() for path in (tmp_path / "inprocess" / "tuned").iterdir()}
    assert len(own) == 4
    one, other = (RunFolder.open(tmp_path / name).read_rounds()[1]["sites"] for name in ("inprocess", "simulated"))
    assert one
    for mine, theirs in zip(one, other, strict=True):
        assert theirs["tuning"]["after"]["loss"] == pytest.approx(mine["tuning"]["after"]["loss"], rel=1e-5)


def check_equal(one: Path, other: Path) -> None:
    """Check that two runs of one round trained, and end with the same weights."""
    ours, theirs = (RunFolder.open(path) for path in (one, other))
    expected, got = ours.load_checkpoint("last"), theirs.load_checkpoint("last")
    assert got.round == expected.round == 1
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(got.tensors[name], tensor), name
    start = ours.load_checkpoint(0)
    assert any((tensor != start.tensors[name]).any() for name, tensor in got.tensors.items())
