"""config.toml of a run: the resolved config and the package versions.

```
unset = ["data.test_rows"]      only if needed: settings that are None, but have another default
seed = 0
...
[versions]
python = "3.11.7"
```
TOML has no null: a setting that is None is left out. It is read back as None from its default or from `unset`.
"""

import logging
import platform
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hfedmoe.config import RunConfig, Section, apply_unset, config_from_tree
from hfedmoe.errors import UserError
from hfedmoe.files.lfs import pointer_in

logger = logging.getLogger(__name__)

END = "# end of file"
"""The last line of config.toml; without it the file is incomplete."""
PACKAGES = ("hfedmoe", "torch", "transformers", "peft", "flwr")


def versions_here() -> dict[str, str]:
    """The installed versions on which the numbers of a run depend."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def config_toml(config: RunConfig) -> str:
    """All settings as TOML, which `load_config` reads."""
    return _dumps(_tree(config))


def run_config_toml(config: RunConfig) -> bytes:
    """The content of config.toml: all settings that the run uses, and the installed versions."""
    tree = _tree(config)
    for section, keys in _unused(config).items():
        for key in keys:
            tree[section].pop(key, None)
    return (_dumps(tree | {"versions": versions_here()}) + END + "\n").encode()


def _unused(config: RunConfig) -> dict[str, set[str]]:
    """Settings of the data's source and split that others replace: a reader would take them for what was used."""
    if config.data.clients is not None:  # every client has a file of its own
        of_split = {"scheme", "alpha", "shards_per_client", "column"}
        return {"data": {"source"}, "partition": of_split}
    own = {"dirichlet": "alpha", "shards": "shards_per_client"}
    return {"partition": {key for scheme, key in own.items() if scheme != config.partition.scheme}}


def _tree(config: RunConfig) -> dict[str, Any]:
    unset = _unset(config)
    return ({"unset": unset} if unset else {}) | _without_none(config.model_dump())


def _dumps(tree: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(tree)


def read_run_config(path: Path) -> RunConfig:
    """Read config.toml of a run; if it was written with other versions, there is a warning, not an error.

    Raises:
        UserError: the file is missing, not TOML, or not a valid config.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree: dict[str, Any] = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent}: not a run folder (it has no {path.name}); name a folder below runs/") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); make it readable") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        if pointer := pointer_in(path):
            raise UserError(pointer) from None
        raise UserError(f"{path}: not valid TOML ({error}); restore the file or start a new run") from None
    if not text.rstrip().endswith(END):
        raise UserError(
            f'{path}: is empty or cut off (its last line is not "{END}"); restore the file or start a new run'
        )
    versions = tree.pop("versions", {})
    apply_unset(tree, str(path))
    config = config_from_tree(tree, str(path))
    _compare(path, versions if isinstance(versions, dict) else {})
    return config


def _compare(path: Path, written: dict[str, Any]) -> None:
    here = versions_here()
    other = [f"{name} {was} (here {here.get(name, 'none')})" for name, was in written.items() if here.get(name) != was]
    if other:
        logger.warning("%s was written with %s: numbers may differ", path, ", ".join(other))


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def _unset(section: Section, prefix: str = "") -> list[str]:
    keys = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            keys += _unset(value, f"{prefix}{name}.")
        elif value is None and field.get_default(call_default_factory=True) is not None:
            keys.append(prefix + name)
    return keys
