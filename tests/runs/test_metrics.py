"""The lines of metrics.jsonl."""

import json
import os

import pytest


def test_rounds_round_trip_as_valid_json(run):
    run.append_round({"round": 1, "loss": float("nan"), "clients": [{"loss": float("-inf"), "name": "Zoë"}]})
    run.append_round({"round": 2, "loss": 0.1})
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == run.read_rounds()
    assert run.read_rounds() == [
        {"round": 1, "loss": None, "clients": [{"loss": None, "name": "Zoë"}]},
        {"round": 2, "loss": 0.1},
    ]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_not_read_and_then_cut_off(run, cut):
    run.append_round({"round": 1})
    run.append_round({"round": 2})
    path = run.path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert run.read_rounds() == [{"round": 1}]
    run.append_round({"round": 2, "again": True})
    assert run.read_rounds() == [{"round": 1}, {"round": 2, "again": True}]


def test_a_damaged_line_is_left_out_with_a_warning(run, caplog):
    (run.path / "metrics.jsonl").write_bytes(b'{"round": 1}\n\0\0\0\n{"round": 3}\n')
    assert [record["round"] for record in run.read_rounds()] == [1, 3]
    assert "line 2 is damaged" in caplog.text


def test_clients_of_a_line_may_come_one_by_one(run):
    run.append_round({"round": 1, "loss": float("nan")}, iter([{"client": 0}, {"client": 1, "x": None}]))
    run.append_round({"round": 2}, iter([]))
    assert run.read_rounds() == [
        {"round": 1, "loss": None, "clients": [{"client": 0}, {"client": 1, "x": None}]},
        {"round": 2, "clients": []},
    ]
