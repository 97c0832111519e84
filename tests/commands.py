"""Commands in this process, for tests that look at other things than the report."""

import pytest

from hfedmoe import cli
from hfedmoe.cli import running


def hfedmoe(*arguments: object) -> int:
    """Run a command in this process; its exit code. Runs get no report, which takes as long as they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_report_of", lambda folder: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)
