"""Make file and folder names in a configuration independent of the current directory."""

from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.data.known import KNOWN
from hfedmoe.data.sources import IN_WHEEL, PACKAGED_ROWS
from hfedmoe.models.names import PACKAGED_MODELS


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths for the model and data files that exist here.

    A run may be resumed or exported from another directory, where a relative path would not exist, or would be read as
    the hub id of another model. Names of packaged models and known data sets stay, even if such a folder exists.
    """
    data = config.data
    own = {*PACKAGED_ROWS, *IN_WHEEL, *KNOWN}
    files = {
        "source": _absolute(data.source, own),
        "test": data.test if data.test is None or not Path(data.test).is_file() else _absolute(data.test, own),
        "clients": data.clients and [_absolute(file, own) for file in data.clients],
    }
    model = {"name": _absolute(config.model.name, set(PACKAGED_MODELS))}
    return config.model_copy(
        update={"model": config.model.model_copy(update=model), "data": data.model_copy(update=files)}
    )


def _absolute(name: str, own: set[str]) -> str:
    path = Path(name).expanduser()
    if name in own or not path.exists():
        return name
    # Links are kept, because the user chose their names; but ".." means the parent of a link's target.
    return str(path.resolve() if ".." in path.parts else path.absolute())
