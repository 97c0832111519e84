"""MLflow. Its address and keys come from its own variables, such as MLFLOW_TRACKING_URI, or from `mlflow_uri`."""

import os
import time
from typing import Any

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.start import FAILED, FINISHED, Start, Status

# Read when the library is imported. A server that does not answer is tried again later, with what is missing.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

KEY = "hfedmoe.key"
ROUND = "round"
"""A metric with the number of the last round, which tells how far the run is."""
METRICS, PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""MLflow's limits: in one request, and in characters."""
STATUS = {FINISHED: "FINISHED", FAILED: "FAILED"}
LOCAL = ("sqlite:", "file:", "/", ".")


class OpenRun:
    """A run of MLflow, found again by a tag."""

    def __init__(self, start: Start) -> None:
        if start.store is not None:
            mlflow.set_tracking_uri(start.store)
        uri = mlflow.get_tracking_uri()
        self._client = MlflowClient(uri)
        experiment = self._experiment(start.project)
        found = self._client.search_runs([experiment], f"tags.`{KEY}` = '{start.key}'", max_results=1)
        run = found[0] if found else self._create(experiment, start)
        self._id = run.info.run_id
        self.last: int | None = int(run.data.metrics.get(ROUND, -1))
        self._client.update_run(self._id, status="RUNNING")
        self.store = uri if uri.startswith(LOCAL) else None  # else a resumed run may use another name of the server
        self.place = f"{uri}, experiment {start.project}, run {self._id}"

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _create(self, experiment: str, start: Start) -> Run:
        tags = {KEY: start.key, "group": start.group, "tags": ", ".join(start.tags)}
        run = self._client.create_run(
            experiment, run_name=start.name, tags={name: value for name, value in tags.items() if value}
        )
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in start.config.items()]
        for part in _parts(params, PARAMS):
            self._client.log_batch(run.info.run_id, params=part)
        return run

    def log(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`."""
        self.gains(round, figures | {ROUND: round})  # last: it tells that the others are there

    def gains(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, round) for name, value in figures.items()]
        for part in _parts(metrics, METRICS):
            self._client.log_batch(self._id, metrics=part)

    def close(self, status: Status) -> None:
        """As `child.Tracker`."""
        self._client.set_terminated(self._id, STATUS.get(status, "KILLED"))


def open_run(start: Start) -> OpenRun:
    """Begin or go on."""
    return OpenRun(start)


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
