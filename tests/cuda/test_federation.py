"""A whole tiny federation with its model on the GPU: as on the CPU, the same bits each time, and after a stop."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hfedmoe.events import Silent
from hfedmoe.export.merged import merge, save
from hfedmoe.models.loading import load
from hfedmoe.models.wrapping import wrap
from hfedmoe.moe.payload import load_all
from hfedmoe.runs.folder import RunFolder
from hfedmoe.simulation import resume, run
from tests.cuda.comparing import assert_same_bits, relative_error
from tests.federation import Federation, StopAt, Stopped, tiny_config

SMALL = (
    "clients.count=3",
    "partition.scheme=iid",  # the others need more packages
    "data.train_rows=90",
    "data.test_rows=12",
    "evaluation.watch_rows=4",
    "train.batch_size=4",
    "train.steps=2",
    "federation.rounds=2",
)
EVERYTHING = (*SMALL, "method.residency=all")
"""Which experts a client holds depends on scores; two that are nearly equal may change places by rounding."""
BUDGETS = (*SMALL, 'clients.budgets=["25%","50%","100%"]', "method.score=taylor", "method.gate=rows")
STEPS = 2 * 2  # rounds, local steps
LOSS, WEIGHTS, CHANGE = 2e-3, 3e-3, 1e-1
"""Relative errors. AdamW moves a weight by about its learning rate also where its gradient is only rounding, and one
token with two nearly equal experts may go to the other. Rounding alone (3e-7 of every linear layer's output, on a CPU)
made 2e-4 of the losses, 6e-4 of the weights and 2e-2 of what they had learnt."""


def on(device: torch.device) -> str:
    return f"model.device={device}"


def losses(folder: RunFolder) -> list[float]:
    """The held-out loss and the training losses of the clients, round by round."""
    found = []
    for line in folder.read_rounds():
        found.append(float(line["loss"]))
        found += [float(row["last_loss"]) for row in line["clients"]]
    return found


def trained(path: Path) -> dict[str, Tensor]:
    with RunFolder.open(path) as folder:
        return dict(folder.load_checkpoint(2).tensors)


@pytest.mark.parametrize(
    "more",
    [(), ("train.experts=full",), ("train.attention=true", "train.gradient_checkpointing=true")],
    ids=["lora", "full", "attention"],
)
def test_the_losses_and_weights_of_the_cpu(more: tuple[str, ...], tmp_path: Path, device: torch.device) -> None:
    found = {}
    for name, where in (("there", device), ("here", torch.device("cpu"))):
        config = tiny_config(*EVERYTHING, *more, on(where))
        folder = RunFolder.create(tmp_path / name, config)
        federation = Federation(folder, config)
        assert federation.prepared.model.device == where
        before = {key: tensor.detach().cpu().clone() for key, tensor in federation.server.tensors.items()}
        federation.run()
        assert {tensor.device for tensor in federation.server.tensors.values()} == {where}
        found[name] = (losses(folder), before, {k: t.cpu() for k, t in federation.server.tensors.items()})
    (there, start, new), (here, expected_start, expected) = found["there"], found["here"]
    assert len(here) > STEPS
    assert there == pytest.approx(here, rel=LOSS)
    assert_same_bits(start, expected_start)
    for kind in sorted({name.split(".")[0] for name in expected}):
        names = [name for name in expected if name.startswith(f"{kind}.")]
        ours, theirs, begun = (
            torch.cat([tensors[name].flatten() for name in names]) for tensors in (new, expected, start)
        )
        assert not torch.equal(theirs, begun)
        assert relative_error(ours, theirs) < WEIGHTS, kind
        assert relative_error(ours - begun, theirs - begun) < CHANGE, kind


@pytest.mark.parametrize("more", [(), ("clients.activation=50%", "method.score=ghost")], ids=["plain", "activation"])
def test_a_run_repeats_itself_and_goes_on_after_a_stop_bit_for_bit(
    more: tuple[str, ...], tmp_path: Path, device: torch.device, same_bits: None
) -> None:
    config = tiny_config(*BUDGETS, *more, on(device))
    whole = run(config, tmp_path / "whole", Silent())
    again = run(config, tmp_path / "again", Silent())
    with pytest.raises(Stopped):
        run(config, tmp_path / "stopped", StopAt(2))
    resume(tmp_path / "stopped", Silent())
    expected = trained(whole)
    assert_same_bits(trained(again), expected)
    assert_same_bits(trained(tmp_path / "stopped"), expected)
    assert not torch.equal(expected["experts.0.up_b"], torch.zeros_like(expected["experts.0.up_b"]))


def test_what_the_gpu_trained_is_merged_and_loaded_on_the_cpu(tmp_path: Path, device: torch.device) -> None:
    config = tiny_config(*BUDGETS, on(device))
    folder = RunFolder.create(tmp_path / "run", config)
    federation = Federation(folder, config)
    federation.run()
    tensors = federation.server.tensors
    folder.close()
    saved = trained(tmp_path / "run")
    assert_same_bits(saved, tensors)
    assert {tensor.device.type for tensor in saved.values()} == {"cpu"}

    logits: list[Tensor] = []
    for where in (device, torch.device("cpu")):
        own = config.model_copy(update={"model": config.model.model_copy(update={"device": str(where)})})
        model = wrap(load(own.model, own.seed).model, own)
        load_all(model, saved)
        assert_same_bits(model.routers, {name: saved[name] for name in model.routers})
        merge(model, torch.float32)
        out = tmp_path / where.type / str(len(logits))
        save(model.model, out)
        stock = type(model.model).from_pretrained(out).eval()
        assert next(stock.parameters()).device.type == "cpu"
        with torch.no_grad():
            logits.append(stock(torch.arange(3, 20)[None]).logits)
        shutil.rmtree(out)
    assert relative_error(logits[0], logits[1]) < 1e-4
