"""A client with a budget in bytes finishes its round in a process limited to it; the whole model cannot."""

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.checkpoints import write
from benchmarks.limited_client import one_round
from transformers import MixtralConfig

from hfedmoe.device.beside import beside
from hfedmoe.device.limits import why_no_cgroup

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's"),
]
LIMIT = 900 << 20
"""Of the process that trains."""
BUDGET = LIMIT + beside("cpu")
CLIENT = """
[model]
name = "{model}"
[data]
max_tokens = 16
[clients]
count = 1
budgets = ["{budget}B"]
[method]
bootstrap = "stream"
bootstrap_batches = 1
[train]
steps = 2
batch_size = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 million parameters, 530 MB in float32; a quarter of the experts is the least that can train."""
    folder = tmp_path_factory.mktemp("limited")
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=2560,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=10,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    assert write(config, folder / "model", torch.bfloat16) > 250_000_000
    (folder / "client.toml").write_text(CLIENT.format(model=folder / "model", budget=BUDGET))
    return folder


@pytest.mark.parametrize("how", ["rlimit", "cgroup"])
def test_a_round_stays_within_the_budget(how: str, folder: Path) -> None:
    if how == "cgroup" and why_no_cgroup() is not None:
        pytest.skip(why_no_cgroup() or "")
    done = one_round(folder, LIMIT, how)
    assert done.update is not None, done.run.stderr
    assert done.run.returncode == 0
    assert not done.run.killed
    assert done.run.peak_bytes < LIMIT
    assert done.resident is not None
    assert done.held is not None
    held = sum(int(keep.sum()) for keep in done.resident)
    assert 12 <= held < 60
    assert done.held["experts"] == held
    assert done.update.work.steps == 2
    assert done.update.work.peak_is_measured


def test_the_whole_model_is_killed_or_refused(folder: Path) -> None:
    done = one_round(folder, LIMIT, whole=True)
    assert done.update is None
    assert done.run.killed or "memory" in done.run.stderr.lower(), done.run
    unlimited = one_round(folder, 4 * LIMIT, whole=True)
    assert unlimited.update is not None, unlimited.run
    assert unlimited.run.peak_bytes > LIMIT
