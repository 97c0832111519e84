"""Run a Flower deployment on loopback, for tests.

One SuperLink and any number of SuperNodes are started as separate processes, each with its own empty
``FLWR_HOME``, on free loopback ports and without TLS. Nothing is installed, no telemetry or update check is
sent, and every process that belongs to the deployment is gone when the context ends::

    with deployment(app_dir, [{"partition-id": 0}, {"partition-id": 1}], env={"HF_HUB_OFFLINE": "1"}) as d:
        result = d.run({"document": json.dumps(config)}, timeout=120)
    assert result.exit_code == 0, result.log

For Linux: the last sweep for strays reads ``/proc``. Written against Flower 1.42, where the SuperLink serves all
its APIs on one HTTP port and a SuperNode serves one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Scalar = bool | int | float | str

HOST = "127.0.0.1"
CONNECTION = "test"
MARKER = "FLOWER_HARNESS_ID"
# Below the ephemeral range (32768 and up), so that an outgoing connection cannot take a chosen port first.
PORTS = range(20_000, 32_000)

_NODE_ID = re.compile(r"SuperNode ID: (\d+)")
_RUN_ID = re.compile(r"Successfully started run (\d+)")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class DeploymentError(RuntimeError):
    """A process of the deployment did not start, died or took too long; the message ends with log tails."""


class _ProcessDied(DeploymentError):
    """A process ended while starting; a port that another process took in the meantime looks like this."""


@dataclass(frozen=True)
class RunResult:
    """How one run ended.

    ``exit_code`` is 0 if the ServerApp returned and 1 if not; ``status`` is Flower's own word
    (``finished:completed``, ``finished:failed``, ``finished:stopped``), ``details`` the reason it gives, and
    ``log`` what the ServerApp printed and logged.
    """

    exit_code: int
    status: str
    details: str
    log: str
    run_id: int
    seconds: float


@dataclass
class _Process:
    """A started process, its log file and (for a SuperNode) its port."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """Return the log so far without colour codes."""
        return _ANSI.sub("", self.log.read_text(encoding="utf-8", errors="replace"))


def toml_value(value: Scalar) -> str:
    """Return ``value`` as a TOML literal; every string survives, whatever quotes or line breaks it holds."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML basic string, except that TOML also wants DEL escaped.
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")


def node_config_argument(config: Mapping[str, Scalar]) -> str:
    """Return a ``--node-config`` argument, refusing strings that Flower's parser would damage.

    Flower splits this argument with a regular expression that knows no escapes; there is no file form. Strings
    are passed in single quotes, which TOML takes literally.
    """
    parts = []
    for key, value in config.items():
        if not isinstance(value, str):
            parts.append(f"{key}={toml_value(value)}")
        elif "'" in value or any(ord(c) < 32 or ord(c) == 127 for c in value):
            raise ValueError(f"node config {key!r}: single quotes and control characters cannot be passed: {value!r}")
        else:
            parts.append(f"{key}='{value}'")
    return " ".join(parts)


@dataclass
class Deployment:
    """A running SuperLink with its SuperNodes; made by :func:`deployment`."""

    app_dir: Path
    folder: Path
    env: Mapping[str, str]
    client_command: Sequence[str] | None = None
    simulated: int = 0
    port: int = 0
    node_ids: list[int] = field(default_factory=list)
    superlink: _Process | None = None
    supernodes: list[_Process] = field(default_factory=list)
    workers: list[_Process] = field(default_factory=list)
    _count: int = 0

    def run(self, run_config: Mapping[str, Scalar] | None = None, *, timeout: float = 120.0) -> RunResult:
        """Submit the app, wait for its end and return how it went.

        Keys of ``run_config`` must exist under ``[tool.flwr.app.config]`` of the app's ``pyproject.toml``. Raises
        :class:`DeploymentError` if the run cannot be submitted or has not ended after ``timeout`` seconds; it then
        goes on until the deployment is stopped.
        """
        self._count += 1
        started = time.monotonic()
        command = ["flwr", "run", str(self.app_dir), CONNECTION, "--stream"]
        if run_config:
            overrides = self.folder / f"run-{self._count}.toml"
            lines = [f"{json.dumps(key)} = {toml_value(value)}" for key, value in run_config.items()]
            overrides.write_text("\n".join(lines) + "\n", encoding="utf-8")
            command += ["--run-config", str(overrides)]
        if self.simulated:
            command += ["--federation-config", f"num-supernodes={self.simulated} client-resources-num-cpus=1"]
        process = self._start(f"run-{self._count}", command, home="cli")
        try:
            process.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            _kill_group(process.popen)
            raise DeploymentError(self._report(f"the run has not ended after {timeout:g} s")) from None
        text = process.text()
        found = _RUN_ID.search(text)
        if found is None:
            raise DeploymentError(self._report(f"`flwr run` exited with {process.popen.returncode}, no run started"))
        run_id = int(found[1])
        status, details = self._status(run_id)
        return RunResult(
            exit_code=0 if status == "finished:completed" else 1,
            status=status,
            details=details,
            log=text,
            run_id=run_id,
            seconds=time.monotonic() - started,
        )

    def kill_node(self, index: int) -> None:
        """Kill a SuperNode and everything it started with SIGKILL, as a power cut would."""
        _kill_group(self.supernodes[index].popen)
        if self.workers:
            _kill_group(self.workers[index].popen)

    def logs(self) -> dict[str, str]:
        """Return the log of every process by name (``superlink``, ``node-0``, ..., ``run-1``, ...)."""
        files = sorted(self.folder.glob("*.log"))
        return {file.stem: _ANSI.sub("", file.read_text(encoding="utf-8", errors="replace")) for file in files}

    def _status(self, run_id: int) -> tuple[str, str]:
        """Ask the SuperLink how a run ended."""
        command = ["flwr", "list", "--run-id", str(run_id), CONNECTION, "--format", "json"]
        env = {**self.env, "FLWR_HOME": str(self._home("cli"))}
        done = subprocess.run(
            command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        try:
            run = json.loads(done.stdout)["runs"][0]
        except (ValueError, KeyError, IndexError):
            raise DeploymentError(self._report(f"`flwr list` said: {done.stdout}{done.stderr}")) from None
        details = str(run.get("status-details") or "")
        return str(run["status"]), "" if details == "N/A" else details

    def _home(self, name: str) -> Path:
        """Return the ``FLWR_HOME`` of a process, made on first use: apps are unpacked there."""
        home = self.folder / "home" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _start(self, name: str, command: Sequence[str], *, home: str | None = None) -> _Process:
        """Start a process in its own group, with its output in ``<name>.log``."""
        log = self.folder / f"{name}.log"
        env = {**self.env, "FLWR_HOME": str(self._home(home or name))}
        with log.open("wb") as stream:
            popen = subprocess.Popen(
                command,
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return _Process(name, popen, log)

    def _start_all(self, node_configs: Sequence[Mapping[str, Scalar]], timeout: float) -> None:
        """Start the SuperLink and the SuperNodes and wait until all are registered."""
        deadline = time.monotonic() + timeout
        self.port, *node_ports = _free_ports(1 + len(node_configs))
        config = self._home("cli") / "config.toml"
        config.write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{HOST}:{self.port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        command = ["flower-superlink", "--insecure", "--host", HOST, "--port", str(self.port)]
        command += ["--simulation"] if self.simulated else []
        self.superlink = self._start("superlink", [*command, "--disable-runtime-dependency-installation"])
        while not _listening(self.port):
            self._check_waiting(self.superlink, deadline)
        for index, (port, node_config) in enumerate(zip(node_ports, node_configs, strict=True)):
            command = ["flower-supernode", "--insecure", "--superlink", f"{HOST}:{self.port}"]
            command += ["--host", HOST, "--port", str(port)]
            if node_config:
                command += ["--node-config", node_config_argument(node_config)]
            if self.client_command is not None:
                command += ["--isolation", "process"]
            self.supernodes.append(self._start(f"node-{index}", command))
            if self.client_command is not None:
                self.workers.append(self._start_worker(index, port, deadline))
        for node in self.supernodes:
            while (found := _NODE_ID.search(node.text())) is None:
                self._check_waiting(node, deadline)
            self.node_ids.append(int(found[1]))

    def _start_worker(self, index: int, port: int, deadline: float) -> _Process:
        """Start the process that answers the messages of a SuperNode, once the SuperNode listens."""
        while not _listening(port):
            self._check_waiting(self.supernodes[index], deadline)
        command = [*(self.client_command or []), "--insecure", "--runtime-api-address", f"{HOST}:{port}"]
        return self._start(f"worker-{index}", command)

    def _check_waiting(self, process: _Process, deadline: float) -> None:
        """Wait a moment for a process, raising if it has died or the time is up."""
        if process.popen.poll() is not None:
            raise _ProcessDied(self._report(f"{process.name} exited with code {process.popen.returncode}"))
        if time.monotonic() > deadline:
            raise DeploymentError(self._report(f"{process.name} was not ready in time"))
        time.sleep(0.05)

    def _report(self, message: str, lines: int = 30) -> str:
        """Return ``message`` with the last lines of every log."""
        tails = [f"--- {name}\n" + "\n".join(text.splitlines()[-lines:]) for name, text in self.logs().items()]
        return "\n".join([message, *tails])

    def _stop(self, grace: float = 3.0) -> None:
        """End every process of this deployment: politely, then by force."""
        started = [process for process in [*self.workers, *self.supernodes, self.superlink] if process is not None]
        for process in started:
            if process.popen.poll() is None:
                process.popen.terminate()
        deadline = time.monotonic() + grace
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            _kill_group(process.popen)
        self.workers, self.supernodes, self.superlink, self.node_ids = [], [], None, []
        # The SuperLink gives its SuperExec a session of its own, which no process group reaches.
        for pid in _marked(self.env[MARKER]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _kill_group(popen: subprocess.Popen[bytes]) -> None:
    """Kill the process group that ``popen`` leads and reap its leader."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def _marked(value: str) -> list[int]:
    """Return the processes that inherited our marker variable (Linux; elsewhere none are found)."""
    wanted = f"{MARKER}={value}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def _free_ports(count: int) -> list[int]:
    """Return ``count`` loopback ports that nobody listens on at this moment."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise DeploymentError(f"no {count} free ports in {PORTS}")


def _listening(port: int) -> bool:
    """Tell whether something accepts connections on a loopback port."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return the environment of all processes: ours, quiet and offline, then ``extra``."""
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {
        # SuperLink and SuperNode look up flower-superexec, flwr-serverapp and flwr-clientapp on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPERGRID_API_URL": f"http://{HOST}:9/v1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # How often the launcher of app processes looks for work; 1 s unless told.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "HF_HUB_OFFLINE": "1",
    }
    env |= extra or {}
    return env | {MARKER: uuid.uuid4().hex}


@contextlib.contextmanager
def deployment(
    app_dir: str | Path,
    node_configs: Sequence[Mapping[str, Scalar]],
    *,
    env: Mapping[str, str] | None = None,
    client_command: Sequence[str] | None = None,
    simulated: int = 0,
    start_timeout: float = 60.0,
    attempts: int = 3,
) -> Iterator[Deployment]:
    """Run a SuperLink and one SuperNode per entry of ``node_configs`` for the length of the context.

    ``env`` reaches every process, ServerApp and ClientApps included. With ``client_command`` the SuperNodes run with
    ``--isolation process``, and for each of them this command is started to answer its messages, with the arguments
    ``--insecure --runtime-api-address HOST:PORT`` of ``flower-superexec``. With ``simulated`` the SuperLink simulates
    so many nodes itself, on Ray. A start that fails because another process took a port in between is tried again,
    ``attempts`` times in all. Raises :class:`DeploymentError` with log tails if the deployment does not come up
    within ``start_timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as name:
        running = Deployment(Path(app_dir).resolve(), Path(name), _environment(env), client_command, simulated)
        try:
            for attempt in range(1, attempts + 1):
                try:
                    running._start_all(node_configs, start_timeout)
                    break
                except _ProcessDied:
                    if attempt == attempts:
                        raise
                    running._stop()
            yield running
        finally:
            running._stop()
