"""Nothing is downloaded in tests: the hub's client is offline before anything imports it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
