"""A run folder to write into."""

import pytest

from hfedmoe.config import RunConfig
from hfedmoe.runs.folder import RunFolder

CONFIG = RunConfig(keep_checkpoints=2)


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        yield folder
