"""What all benchmarks share: the machine, the table, the JSON file, and workers in separate processes."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfedmoe.device.probe import processor_name


def machine() -> dict[str, Any]:
    """The machine and the versions that were measured."""
    import torch
    import transformers

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    return arguments


def report(
    rows: list[dict[str, Any]], summary: dict[str, Any], file: Path | None, more: dict[str, Any] | None = None
) -> None:
    """Print the rows as a table, then the summary; write both and the machine to `file` if one is given.

    Args:
        more: further tables for the file.
    """
    where = machine()
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    if rows:
        columns = list(rows[0])
        cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for key, value in summary.items():
        print(f"{key}: {_cell(value)}")
    if file is not None:
        file.write_text(
            json.dumps({"machine": where, "rows": rows, **(more or {}), "summary": summary}, indent=2) + "\n"
        )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_own_process(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS` and return the JSON object on the last line of its output.

    Raises:
        RuntimeError: the process failed; the message ends with its error output.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{module} {' '.join(arguments)} exited with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
