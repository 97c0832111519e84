"""Names of folders and files in a configuration, as they are found from any directory."""

from pathlib import Path

from hfedmoe.config import RunConfig
from hfedmoe.data.known import KNOWN
from hfedmoe.data.sources import IN_WHEEL, PACKAGED_ROWS
from hfedmoe.models.names import PACKAGED_MODELS


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with the absolute paths of the model and data files that are here.

    A run is resumed and exported from elsewhere, where a relative name would mean nothing, or a stranger's model on the
    hub. Names that hfedmoe itself gives stay, whatever folders are called like them.
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
    # Links stay, for they have the name that somebody chose; but what is above one is above its target.
    return str(path.resolve() if ".." in path.parts else path.absolute())
