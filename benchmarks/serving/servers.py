"""Start and stop real inference servers on this machine: on loopback ports, from environments of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
BACKEND = Path(__file__).with_name("onnxruntime_backend.py")
POLLING = ("--model-control-mode=poll", "--repository-poll-secs=1")
"""Triton looks for new versions by itself."""
READY_SECONDS = 90
"""Real servers are up in 2 to 7 seconds; a busy machine may take longer."""
LOG_LINES = 25


def environment(name: str) -> Path | None:
    """Folder of an environment that `make servers` made: `triton`, `mlserver`, `kserve`; None: it is not there."""
    folder = Path(os.environ.get(f"OPTIN_{name.upper()}_VENV", ROOT / f".venv-{name}"))
    return folder if (folder / "bin/python").exists() else None


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


class ServerProcess:
    """One server; a context manager. Ports stay the same over restarts."""

    def __init__(self, scratch: Path) -> None:
        """Args: scratch: folder for its log and whatever it needs beside the repository."""
        scratch.mkdir(parents=True, exist_ok=True)
        self.scratch = scratch
        self.log = scratch / "server.log"
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        """Address of HTTP as host:port."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """Address of gRPC as host:port."""
        return f"127.0.0.1:{self.grpc_port}"

    def command(self) -> Sequence[str]:
        """What is run."""
        raise NotImplementedError

    def variables(self) -> Mapping[str, str]:
        """Environment variables beside those of this process."""
        return {}

    def start(self) -> None:
        """Start, and wait until it is ready.

        Raises: RuntimeError: it ended, or was not ready in time; with the end of its log.
        """
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command()],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.scratch,
                env={**os.environ, **self.variables()},
                start_new_session=True,  # so that its workers can be ended with it
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{self.command()[0]} was not ready. The end of its log:\n{self.tail()}")
            time.sleep(0.1)

    def ready(self) -> bool:
        """Does it take requests, over both protocols?"""
        try:
            socket.create_connection(("127.0.0.1", self.grpc_port), timeout=5).close()
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def kill(self) -> None:
        """kill -9, its workers too."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end; kill it if it does not."""
        try:
            self._end(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, how)
        self._process.wait(timeout=30)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class TritonServer(ServerProcess):
    """tritonserver, out of the package nvidia-pytriton, with a python-based backend for ONNX files."""

    def __init__(self, repository: Path, scratch: Path, *, home: Path, control: Sequence[str] = POLLING) -> None:
        """Args: home: its environment. control: arguments that say when which models are loaded."""
        super().__init__(scratch)
        self.repository, self._control = repository, control
        self._home = home
        self._site = next((home / "lib").glob("python3*/site-packages"))
        self._backends = _put_backends(self._site / "pytriton/tritonserver", scratch / "backends")

    def command(self) -> Sequence[str]:
        """See `ServerProcess.command`."""
        return [
            str(self._site / "pytriton/tritonserver/bin/tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._backends}",
            *self._control,
            "--exit-on-error=false",
            *(f"--{each}-address=127.0.0.1" for each in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--backend-config=python,shm-default-byte-size=4194304",
            f"--backend-config=python,shm-region-prefix-name=optin-{self.http_port}",
        ]

    def variables(self) -> Mapping[str, str]:
        """See `ServerProcess.variables`."""
        libraries = [str(self._site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
        return {
            "PATH": f"{self._home / 'bin'}:{os.environ['PATH']}",  # the backend takes the first python3
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
            "PYTHONPATH": str(self._site),  # the stub does not look into the environment by itself
        }


class MLServerProcess(ServerProcess):
    """MLServer, in one process."""

    def __init__(self, repository: Path, scratch: Path, *, home: Path) -> None:
        """Args: home: its environment."""
        super().__init__(scratch)
        self.repository, self._home = repository, home

    def command(self) -> Sequence[str]:
        """See `ServerProcess.command`."""
        return [str(self._home / "bin/mlserver"), "start", str(self.repository)]

    def variables(self) -> Mapping[str, str]:
        """See `ServerProcess.variables`."""
        settings = {
            "HOST": "127.0.0.1",
            "HTTP_PORT": self.http_port,
            "GRPC_PORT": self.grpc_port,
            "METRICS_PORT": self.metrics_port,
            "PARALLEL_WORKERS": 0,
            "DEBUG": "false",
        }
        return {f"MLSERVER_{name}": str(value) for name, value in settings.items()}


def _put_backends(package: Path, folder: Path) -> Path:
    """The python backend with its stub, and a copy of both named `onnxruntime` with a model.py for all models."""
    if not folder.exists():
        python = shutil.copytree(package / "backends/python", folder / "python")
        stub = package / f"python_backend_stubs/{sysconfig.get_python_version()}/triton_python_backend_stub"
        shutil.copy(stub, python)
        shutil.copytree(python, folder / "onnxruntime")
        shutil.copyfile(BACKEND, folder / "onnxruntime/model.py")
    return folder
