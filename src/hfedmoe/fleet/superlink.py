"""Flower's SuperLink on loopback: started, looked after, and told who is on the roster and what runs."""

import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from subprocess import Popen

import httpx
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from hfedmoe.errors import UserError
from hfedmoe.files.disk import disk_errors
from hfedmoe.fleet.bundle import bundle
from hfedmoe.fleet.certificates import LOOPBACK
from hfedmoe.fleet.children import free_port, listens, quiet, start, stop
from hfedmoe.fleet.folder import Folder
from hfedmoe.fleet.lean import FRUGAL, lean
from hfedmoe.fleet.roster import Invited
from hfedmoe.fleet.secret import write_secret

logger = logging.getLogger(__name__)

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
START_S, LOOK_S, AGAIN_S = 60.0, 0.5, 2.0


class SuperLink:
    """A running SuperLink. Made by `superlink`; raises UserError if the fleet's files cannot be used."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"{LOOPBACK}:{self.port}"
        self.log = folder.logs / "superlink.log"
        self.secret = folder.path / "superexec.secret"
        with disk_errors(self.secret, "serve again"):
            self.secret.unlink(missing_ok=True)
        write_secret(self.secret, secrets.token_hex(32).encode())
        try:
            self.ca = folder.ca.read_bytes()
            self.control = ControlHttpClient.from_server_address(
                self.address,
                insecure=False,
                root_certificates=self.ca,
                interceptors=[RuntimeVersionHttpInterceptor(component_name="hfedmoe")],
            )  # without retries: they would keep the caretaker from starting the SuperLink again
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UserError(f"{folder.ca}: cannot be read as a certificate ({_reason(error)})") from None

    def launch(self) -> "Popen[bytes]":
        """Start the process. It keeps nodes and runs in the fleet's database, so it can be started again."""
        command = [*lean("flower-superlink"), "--host", LOOPBACK, "--port", str(self.port)]
        command += ["--ssl-ca-certfile", str(self.folder.ca), "--ssl-certfile", str(self.folder.certificate)]
        command += ["--ssl-keyfile", str(self.folder.key), "--enable-supernode-auth"]
        command += ["--database", str(self.folder.database), "--disable-runtime-dependency-installation"]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(self.secret)]
        return start(command, self.log, quiet(self.folder.path / "flwr") | FRUGAL)

    def register(self, invited: dict[bytes, Invited]) -> None:
        """Make Flower know exactly the keys on the roster. Raises UserError if the SuperLink does not do it."""
        with self._answering("take the roster"):
            nodes = self.control.ListNodes(ListNodesRequest()).nodes_info
            known = {node.public_key: node.node_id for node in nodes if not node.HasField("unregistered_at")}
            for key, device in invited.items():
                if key not in known:
                    self.control.RegisterNode(RegisterNodeRequest(public_key=key, name=device.name))
            for key, node in known.items():
                if key not in invited:
                    self.control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def stop_old_runs(self) -> None:
        """End the runs of a server that was killed. Raises UserError if the SuperLink does not do it."""
        with self._answering("end an earlier run"):
            for run in self.control.ListRuns(ListRunsRequest(limit=1000)).run_dict.values():
                if run.status.status != "finished":
                    self.control.StopRun(StopRunRequest(run_id=run.run_id))

    def start_run(self, settings: dict[str, bool | int | float | str]) -> int:
        """Start a run with these entries of Flower's run config; returns its id. Raises UserError if it is refused."""
        app = bundle()
        fab = fab_to_proto(Fab(hashlib.sha256(app).hexdigest(), app, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(settings), federation="")
        with self._answering("start the run"):
            return int(self.control.StartRun(request).run_id)

    @contextlib.contextmanager
    def _answering(self, doing: str) -> Iterator[None]:
        """Turn what a call of the SuperLink raises into a UserError."""
        try:
            yield
        except RunNotRunningException:
            raise UserError(f"Flower's SuperLink has ended the run, perhaps on request; see {self.log}") from None
        except httpx.HTTPError as error:
            raise UserError(f"Flower's SuperLink did not {doing} ({_reason(error)}); see {self.log}") from None

    @contextlib.contextmanager
    def serving(self, run_id: int) -> Iterator[HttpGrid]:
        """Be the server app of a run: the grid to its devices. At the end Flower is told how it ended.

        Raises:
            UserError: the SuperLink does not hand out the run, or ends it.
        """
        token = self._acquire(run_id)
        client = self._runtime(RuntimeTokenHttpInterceptor(token))
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        grid = HttpGrid(self.address, insecure=False, root_certificates=self.ca, token=token)
        status, details = "failed", "ended early"
        try:
            with self._answering("hand out the run"):
                task = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            grid.set_run(run_from_proto(task.run))
            with self._answering("pass messages on"):
                yield grid
            status, details = "completed", ""
        finally:
            heartbeat.stop()
            try:
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
            except httpx.HTTPError as error:
                logger.warning("Flower could not be told that the run ended: %s", error)
            grid.close()
            client.close()

    def _acquire(self, run_id: int) -> str:
        """The token of the run's server app. Raises UserError if there is none in time."""
        client = self._runtime(
            SuperExecAuthHttpInterceptor(master_secret=self.secret.read_bytes(), protected_methods={ACQUIRE})
        )
        deadline = time.monotonic() + START_S
        with client:
            while time.monotonic() < deadline:
                with self._answering("hand out the run"):
                    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                if found.HasField("task") and found.token and found.task.run_id == run_id:
                    return str(found.token)
                time.sleep(LOOK_S)
        raise UserError(f"Flower did not start the run; see {self.log}")

    def _runtime(self, identity: RuntimeTokenHttpInterceptor | SuperExecAuthHttpInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self.address,
            insecure=False,
            root_certificates=self.ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), identity],
            retry_invoker=make_simple_http_retry_invoker(),
        )


@contextlib.contextmanager
def superlink(folder: Folder, look: Callable[[], None]) -> Iterator[SuperLink]:
    """Run a SuperLink for the block, and start it again if it dies.

    Args:
        look: called about twice a second, in another thread.

    Raises:
        UserError: it does not start.
    """
    link = SuperLink(folder)
    process = link.launch()
    closing = threading.Event()

    def look_after() -> None:
        nonlocal process
        said = ""
        while not closing.wait(LOOK_S):
            try:
                if process.poll() is not None:
                    logger.warning("the SuperLink ended (code %s) and is started again", process.returncode)
                    process = link.launch()
                    closing.wait(AGAIN_S)
                look()
                said = ""
            except Exception as error:  # of any kind: the next look may work, and the run goes on
                text = f"looking after the fleet failed: {_reason(error)}"
                if text != said:
                    said = text
                    logger.warning(text, exc_info=None if isinstance(error, UserError) else error)

    caretaker = threading.Thread(target=look_after, name="caretaker", daemon=True)
    try:
        _await(link, process)
        caretaker.start()
        yield link
    finally:
        closing.set()
        if caretaker.ident is not None:
            caretaker.join()
        stop(process)
        link.control.close()
        link.secret.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _await(link: SuperLink, process: "Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while not listens(link.port):
        if process.poll() is not None:
            raise UserError(f"Flower's SuperLink ended with code {process.returncode}; see {link.log}")
        if time.monotonic() > deadline:
            raise UserError(f"Flower's SuperLink did not start within {START_S:.0f} s; see {link.log}")
        time.sleep(0.1)
