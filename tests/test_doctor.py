"""The doctor: what is missing is named with the command that mends it, and the network is left alone."""

import importlib.metadata
import socket

import pytest

from hfedmoe import doctor
from hfedmoe.models import packaged


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
