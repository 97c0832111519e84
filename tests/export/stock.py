"""What the stock libraries make of exported folders, in a process that never imports hfedmoe."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

CODE = """
import contextlib, io, json, os, re, sys, torch
from safetensors.torch import load_file, save_file
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

jobs, logits = json.load(open(sys.argv[1])), {}
for name, job in jobs.items():
    where = job["base"] or job["folder"]
    seq2seq = AutoConfig.from_pretrained(where).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(where)
    if job["base"]:
        model = PeftModel.from_pretrained(model, job["folder"])
    with torch.no_grad():
        logits[name] = model.eval()(**load_file(job["inputs"])).logits.float()
save_file(logits, sys.argv[2])
for card in sys.argv[3:]:
    os.chdir(os.path.dirname(card))
    (block,) = re.findall(r"```python\\n(.*?)```", open(card).read(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    assert printed.getvalue().strip(), card
assert "hfedmoe" not in sys.modules
"""

Job = tuple[Path, Path | None, dict[str, Tensor]]
"""A folder, the base model's folder if the first holds an adapter, and the inputs."""


def stock_logits(jobs: dict[str, Job], scratch: Path, cards: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Logits [B, S, V] of every job, all from one process (starting one takes long).

    Args:
        cards: model cards whose code must run in their folders, and print something.
    """
    tree = {}
    for name, (folder, base, inputs) in jobs.items():
        save_file({key: value.contiguous() for key, value in inputs.items()}, scratch / f"{name}.safetensors")
        tree[name] = {"folder": str(folder), "base": str(base or ""), "inputs": str(scratch / f"{name}.safetensors")}
    (scratch / "jobs.json").write_text(json.dumps(tree))
    arguments = [scratch / "jobs.json", scratch / "logits.safetensors", *cards]
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for complaint in ("newly initialized", "missing adapter keys", "UNEXPECTED", "MISSING"):
        assert complaint not in done.stderr, done.stderr
    return load_file(scratch / "logits.safetensors")
