"""Nothing is downloaded in tests, and nothing runs on more than one thread: tiny models are slower on two.

Both are said before anything imports the hub's client or torch, and hold for the processes that tests start.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
