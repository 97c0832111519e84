"""The doctor: what is missing is named with the command that mends it, and the network is left alone."""

import importlib.metadata
import socket

import pytest
import torch

from hfedmoe import doctor
from hfedmoe.models import packaged
from hfedmoe.report.next_steps import next_steps
from hfedmoe.runs.folder import RunFolder
from tests.federation import tiny_config


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the doctor used the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_healthy_machine_uses_no_network():
    report = doctor.examine()
    assert report.fit
    assert report.can_run["a tiny random model (hfedmoe run tiny)"]


def test_a_missing_package_is_essential(monkeypatch):
    version = importlib.metadata.version

    def without_peft(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "gguf" else version(name)

    monkeypatch.setattr(doctor, "version", without_peft)
    report = doctor.examine()
    assert not report.fit
    assert not any(report.can_run.values())
    remedies = {item.what: item.remedy for item in report.missing if item.essential}
    assert remedies["peft"] == 'pip install "peft>=0.21"'
    assert remedies["gguf 0.1 is not >=0.17"] == 'pip install "gguf>=0.17"'
    assert "nothing runs without it" in doctor.as_text(report)


def test_the_packaged_model_is_missing(monkeypatch):
    monkeypatch.setattr(packaged, "gguf_file", lambda: None)
    report = doctor.examine()
    assert report.fit
    assert not report.can_run["the built-in example (hfedmoe run)"]
    assert packaged.INSTALL in [item.remedy for item in report.missing]


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert any("cache folder cannot be written" in item.what for item in doctor.examine().missing)


def test_the_hub_is_asked_only_on_request():
    assert doctor.examine(hub=True).can_run["models and data sets from the hub"] is False
    assert "models and data sets from the hub" not in doctor.examine().can_run


def test_a_command_beside_this_python_counts_as_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "bin" / "python"))
    over_a_network = "a Flower federation over a network"
    assert not doctor.examine().can_run[over_a_network]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flower-superlink").touch()
    assert doctor.examine().can_run[over_a_network]


def steps(place, model=True):
    return [step.command for step in next_steps(place, model)]


def test_it_says_what_to_do_next(tmp_path, monkeypatch):
    assert steps(tmp_path) == ["hfedmoe run", "hfedmoe init FILE --model smollm2-domains"]
    assert steps(tmp_path, model=False) == ["hfedmoe run tiny", "hfedmoe init FILE --model tiny"]
    (tmp_path / "my rows.csv").write_text("text,label\na,b\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert steps(tmp_path) == ["hfedmoe init 'my rows.csv' --model smollm2-domains"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text('[data]\nsource = "my rows.csv"\n')
    assert steps(tmp_path) == ["hfedmoe run my.toml"]
    (tmp_path / "my rows.csv").unlink()
    assert steps(tmp_path)[0] == "hfedmoe run"  # that config would not run
    run = tmp_path / "runs" / "first"
    with RunFolder.create(run, tiny_config()) as folder:
        folder.save_checkpoint(1, {"a": torch.ones(2)}, {})
        assert steps(tmp_path) == ["hfedmoe resume runs/first", "hfedmoe watch runs/first"]
        folder.save_checkpoint(2, {"a": torch.ones(2)}, {})
    assert steps(tmp_path) == ["hfedmoe chat runs/first", "hfedmoe export runs/first OUT"]
    assert "next\n  hfedmoe chat runs/first  # try the model of this run" in doctor.as_text(doctor.examine())
    (run / "config.toml").write_text("cut")
    assert steps(tmp_path)[0] == "hfedmoe run"


def test_first_comes_what_nothing_runs_without(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "gguf" else version(name))
    assert [step.command for step in doctor.examine().next] == ['pip install "gguf>=0.17"', "hfedmoe doctor"]
