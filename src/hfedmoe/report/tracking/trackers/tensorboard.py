"""TensorBoard: event files in the run's folder, so that `tensorboard --logdir runs` shows all runs."""

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.plugins.text import metadata as texts
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.start import Start, Status


class Run:
    """Event files. The figures of a round are one record, which is there as a whole or not at all."""

    last: int | None = None  # it need not be known: what is sent again replaces what was there
    store: str | None = None

    def __init__(self, start: Start) -> None:
        folder = Path(start.folder or Path("runs", f"{start.name}-{start.key}")) / "tensorboard"
        self.place = str(folder)
        continued = folder.is_dir() and any(folder.iterdir())
        if continued:
            _wait_for_another_second(folder)
        self._writer = EventFileWriter(str(folder))
        if continued:  # readers drop what earlier files have from this step on
            log = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=_now(), step=start.next_round, session_log=log))
        if not continued or start.next_round == 0:
            self._add(0, [_settings(start), _hparams(start)])

    def log(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`."""
        self._add(round, [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()])

    gains = log

    def close(self, status: Status) -> None:
        """As `child.Tracker`."""
        self._writer.close()

    def _add(self, round: int, values: list[Any]) -> None:
        self._writer.add_event(Event(wall_time=_now(), step=round, summary=Summary(value=values)))
        self._writer.flush()


def open_run(start: Start) -> Run:
    """Begin or go on."""
    return Run(start)


def _wait_for_another_second(folder: Path) -> None:
    """Readers take event files in the order of their names, which have the second in which they began."""
    now = time.time()
    if any(f".{int(now)}." in path.name for path in folder.iterdir()):
        time.sleep(1 - now % 1)


def _now() -> float:
    return time.time()


def _settings(start: Start) -> Any:
    """A table for the page of texts."""
    lines = ["| setting | value |", "|---|---|"]
    more = {"group": start.group} if start.group else {}
    lines += [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in (start.config | more).items()]
    text = "\n".join(lines).encode()
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text], tensor_shape=shape)
    return Summary.Value(tag="settings", metadata=texts.create_summary_metadata("", ""), tensor=tensor)


def _hparams(start: Start) -> Any:
    """For the page of hyperparameters, which compares runs."""
    info = SessionStartInfo(group_name=start.group or "")
    for key, value in start.config.items():
        if isinstance(value, bool):
            info.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[key].number_value = value
        else:
            info.hparams[key].string_value = value
    metadata = hparams.create_summary_metadata(HParamsPluginData(session_start_info=info))
    return Summary.Value(tag=hparams.SESSION_START_INFO_TAG, metadata=metadata, tensor=hparams.NULL_TENSOR)
