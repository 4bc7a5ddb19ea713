"""Starting, asking and ending the processes of `bench`."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


WORKER = "optimum_zsaq.report.bench_worker"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
_TAIL = 3  # lines of stderr that are told of a process that died


class WorkerError(Exception):
    """A request failed or its process died; the text says why, `traceback` where, if that is known."""

    def __init__(self, reason: str, traceback: str = ""):
        super().__init__(reason)
        self.traceback = traceback


class WorkerProcess:
    """A process that answers requests (`bench_worker.py`); a context manager that ends it.

    Args:
        log (`Path`): file for its stderr.
        threads (`int`): processor threads of all its libraries.
        timeout (`float`): seconds that an answer may take.
    """

    def __init__(self, log: Path, threads: int, timeout: float):
        self.log, self.timeout = log, timeout
        environment = {**os.environ, **_QUIET, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the workers
            )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerError: it failed, took too long, or the process died.
        """
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(self._how_it_died()) from error
        line = self._read_line()
        if not line.endswith(b"\n"):
            raise WorkerError(self._how_it_died())
        reply = json.loads(line)
        if "failed" in reply:
            raise WorkerError(reply["failed"], reply["traceback"])
        return reply

    def _read_line(self) -> bytes:
        descriptor, line, deadline = self._process.stdout.fileno(), b"", time.monotonic() + self.timeout
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.end()
                raise WorkerError(f"gave no answer within {self.timeout:g} s; --timeout allows more")
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            line += part
        return line

    def _how_it_died(self) -> str:
        self.end(grace=5.0)
        code = self._process.returncode
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name + (", often too little memory" if -code == signal.SIGKILL else "")
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TAIL:]
        return f"its process died ({how})" + "".join(f" | {line.strip()}" for line in lines)

    def end(self, grace: float = 0.0) -> None:
        """End the process and what it started; `grace` are seconds to let it end by itself."""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:
                pass
