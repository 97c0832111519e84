"""For SuperNodes that tests start, with this folder on PYTHONPATH: nothing but Flower's waits is shorter.

A SuperNode asks for messages every 3 s and says every 20 s that it is there; it is taken as gone after 60 s.
"""

import sys
import time
from types import SimpleNamespace

if len(sys.orig_argv) > 1 and sys.orig_argv[1].endswith("flower-supernode"):
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal

    def _sleep(seconds: float) -> None:
        time.sleep(seconds / 10)

    start_client_internal.time = SimpleNamespace(**{**vars(time), "sleep": _sleep})
    # 10 s is the shortest that a SuperLink allows.
    heartbeat.HEARTBEAT_DEFAULT_INTERVAL = fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 10
