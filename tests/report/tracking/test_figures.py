"""What trackers are told: hand-computed figures, and nothing that belongs to a device."""

import json
import math

from hfedmoe.report.tracking.figures import of_gains, of_round
from hfedmoe.report.tracking.settings import told
from tests.federation import tiny_config
from tests.report.tracking.records import LABEL, clients, config, line


def test_the_figures_of_a_round() -> None:
    figures = of_round(line(1), clients(1), every_client=False, bytes_before=5000)
    assert figures == {
        "all/accuracy": 0.25,
        "all/loss": 3.5,
        "bytes/down": 1000.0,
        "bytes/up": 100.0,
        "bytes/total": 6100.0,
        "seconds/round": 2.0,
        "phase/average": 0.5,
        "clients/ok": 2.0,
        "clients/left_out": 1.0,
        "train/loss": 1.75,  # (10 * 1 + 30 * 2) / 40
        "train/steps": 4.0,
        "experts/held_mean": 12.0,
        "experts/trained_mean": 7.0,
        "experts/total": 32.0,
        "clients/peak_bytes_max": 0.0,
        "clients/seconds_max": 3.0,
    }
    assert of_round(line(0), clients(0), every_client=True, bytes_before=0) == {
        "all/accuracy": 0.25,
        "all/loss": 4.0,
        "bytes/total": 0.0,
    }


def test_series_of_clients_only_on_request_and_only_what_is_known_of_one_left_out() -> None:
    figures = of_round(line(1), clients(1), every_client=True, bytes_before=0)
    assert figures["client/1/loss"] == 2.0
    assert figures["client/1/held_experts"] == 16.0
    of_late = {name: value for name, value in figures.items() if name.startswith("client/2/")}
    assert of_late == {"client/2/ok": 0.0, "client/2/bytes_down": 500.0, "client/2/bytes_up": 0.0}


def test_what_is_not_finite_is_left_out() -> None:
    broken = line(1)
    broken["evaluation"]["all"] |= {"loss": math.inf, "perplexity": math.nan}
    figures = of_round(broken, clients(1), every_client=False, bytes_before=0)
    assert "all/loss" not in figures
    assert "all/perplexity" not in figures


def test_of_clients_own_rows_the_worst_the_median_and_the_best() -> None:
    own = [
        {"client": n, "name": "x", "own_rows": 10, "accuracy": share, "loss": 1.0} for n, share in enumerate((0.5, 0.2))
    ]
    figures = of_round(line(1) | {"personal": own}, clients(1), every_client=True, bytes_before=0)
    found = {name: value for name, value in figures.items() if name.startswith("personal")}
    assert found == {"personal/worst": 0.2, "personal/median": 0.35, "personal/best": 0.5}


def test_gains_without_names_and_labels() -> None:
    score = {"accuracy": 0.5, "macro_f1": None, "loss": 1.0, "interval": None}
    sites = [
        {"client": 0, "name": LABEL, "labels": {LABEL: 3}, "gain": 0.5, "before": score, "federated": score}
        | {"alone": None},
        {"client": 1, "name": "b", "labels": {}, "gain": -0.25, "before": score, "federated": score, "alone": score},
    ]
    assert of_gains(sites, every_client=False) == {
        "sites/gain_mean": 0.125,
        "sites/gain_min": -0.25,
        "sites/gain_max": 0.5,
        "sites/gained": 1.0,
        "sites/measured": 2.0,
    }
    every = of_gains(sites, every_client=True)
    assert every["client/1/alone_accuracy"] == 0.5
    assert "client/0/alone_accuracy" not in every
    assert LABEL not in json.dumps(every)


def test_settings_are_told_without_labels_and_without_folders_of_this_machine() -> None:
    settings = told(config("tensorboard", "data.source=/home/alice/ward.csv", "model.name=/srv/models/olmoe"))
    assert settings["train.lr"] == tiny_config().train.lr
    assert settings["data.source"] == "ward.csv"
    assert settings["model.name"] == "olmoe"
    assert settings["clients.budgets"] == '["25%", "50%", "100%", "50%"]'
    assert "versions.hfedmoe" in settings
    text = json.dumps(settings)
    assert LABEL not in text
    assert "alice" not in text
    assert not any(key.startswith("tracking") for key in settings)
