# The types of what `__init__.py` imports when it is first used.
from hfedmoe.api import Experts as Experts
from hfedmoe.api import Run as Run
from hfedmoe.api import open_run as open_run
from hfedmoe.api import resume as resume
from hfedmoe.api import run as run
from hfedmoe.config import RunConfig as RunConfig
from hfedmoe.config import load_config as load_config
from hfedmoe.errors import UserError as UserError

__version__: str
