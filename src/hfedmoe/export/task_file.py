"""`hfedmoe.json` in an export: the settings of its task, so that it is measured and used as the run was.

The weights alone do not say which labels there are, nor how a text becomes a prompt. Without this file the labels of
the measured rows would be the choices, and the same weights would get another score.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hfedmoe.config import RunConfig, config_from_tree
from hfedmoe.data.known import known_set
from hfedmoe.errors import UserError
from hfedmoe.runs.existing import EXPORT

FORMAT = 1
OF_DATA = (
    "format",
    "text",
    "label",
    "choices",
    "answer",
    "answers",
    "completion",
    "labels",
    "label_words",
    "template",
    "chat",
    "chat_system",
    "chat_arguments",
    "chat_date",
    "max_tokens",
)
"""Settings of `data` that say what a row is and how it becomes a prompt; none names a file."""
OF_EVALUATION = ("batch_size", "scoring")


def task_json(config: RunConfig, dtype: str) -> str:
    """The content of the file.

    Args:
        config: of the run, with the kind of task and the labels that it found (`Prepared.settled`).
        dtype: of the exported weights.
    """
    sections = {
        "data": {key: getattr(config.data, key) for key in OF_DATA},
        "evaluation": {key: getattr(config.evaluation, key) for key in OF_EVALUATION},
        "model": {"dtype": dtype, "compute": config.model.compute},
        "train": {"loss": config.train.loss},
    }
    known = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    return json.dumps({"format": FORMAT, "hfedmoe": version("hfedmoe"), **known}, indent=2, ensure_ascii=False) + "\n"


def read_task(folder: Path, overrides: list[str] | None = None) -> RunConfig:
    """The settings of an export: those of its task, with its folder as the model, and with `--set` overrides.

    Code beside the weights runs only if the user says so, never because this file does.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = folder / EXPORT
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); export the run again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UserError(f"{path}: is of another version of hfedmoe; export the run again")
    known = {"data": OF_DATA, "evaluation": OF_EVALUATION, "model": ("dtype", "compute"), "train": ("loss",)}
    sections = {name: dict(_section(tree, name, path)) for name in known}
    for name, allowed in known.items():
        strangers = sorted(sections[name].keys() - set(allowed))
        if strangers:
            raise UserError(f"{path}: {name}.{strangers[0]} has no place in it; export the run again")
    sections["model"]["name"] = str(folder)
    return config_from_tree(sections, str(path), overrides)


def with_labels(config: RunConfig, exported: RunConfig) -> RunConfig:
    """The settings with the labels of an export, if they name neither labels nor a known data set."""
    if config.data.labels is not None or exported.data.labels is None or known_set(config.data) is not None:
        return config
    own = {"labels": exported.data.labels, "label_words": config.data.label_words or exported.data.label_words}
    if isinstance(exported.data.labels, dict):
        own["label_words"] = None
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def _section(tree: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = tree.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is not a table; export the run again")
    return section
