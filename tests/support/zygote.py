# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of this project, forked from one process that has imported everything: the *zygote*.

A daemon spends most of its start on imports, and the tests start hundreds of daemons and commands.
:class:`Popen` takes the place of :class:`subprocess.Popen` for commands of the form ``python -m
MODULE ...``: arguments, environment, directory, descriptors, process group, signals and exit status
are the same.  A command of another form, or with an option that the zygote does not support, is
executed.

The zygote forks twice and its child ends at once, so the grandchild becomes a child of this process
(``PR_SET_CHILD_SUBREAPER``), which waits for it as for any other child.  The kernel kills the
grandchild when this process dies (``PR_SET_PDEATHSIG``).  The zygote ends when its socket is
closed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, AnyStr

from tests.support import event_loop

TREE = Path(__file__).parents[2]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_REQUEST, MAX_FDS = 1 << 20, 250
ANSWER_TIMEOUT_S = 240.0
PRELOADED = (
    "migrate.cli.daemons", "migrate.cli.guests", "migrate.cli.loopback", "migrate.cli.migrate",
    "migrate.cli.migrations", "migrate.cli.preflight", "migrate.service.journal",
    "migrate.xl.restore", "migrate.xl.save", "receiver.command", "sender.command",
    "xenbackend.simulated.client", "xenbackend.simulated.host", "xenbackend.libxenctrl.hypervisor",
)  # fmt: skip
_libc = ctypes.CDLL(None)


class Popen(subprocess.Popen[AnyStr]):
    """A :class:`subprocess.Popen` whose process the zygote forks, if possible."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Sequence[int],
        cwd: Any, env: Any, startupinfo: Any, creationflags: int, shell: bool, p2cread: int,
        p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int,
        restore_signals: bool, gid: Any, gids: Any, uid: Any, umask: int, start_new_session: bool,
        process_group: int,
    ) -> None:  # fmt: skip
        environment = {
            key: os.fspath(value) for key, value in (os.environ if env is None else env).items()
        }
        command = [os.fspath(arg) for arg in args] if isinstance(args, list | tuple) else []
        ends = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        if (
            command[:2] != [sys.executable, "-m"]
            or of_the_interpreter(environment) != of_the_interpreter(ENVIRONMENT)
            or any(option is not None for option in (executable, preexec_fn, gid, gids, uid))
            or (shell, close_fds, restore_signals, umask) != (False, True, True, -1)
        ):
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, *ends, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )  # fmt: skip
            return
        standard: list[int] = [
            own if end == -1 else end for own, end in enumerate((p2cread, c2pwrite, errwrite))
        ]
        request = {
            "command": command,
            "environment": environment,
            "directory": os.path.abspath(cwd or "."),
            "descriptors": [0, 1, 2, *pass_fds],
            "umask": _umask(),
            "session": start_new_session,
            "group": process_group,
            "parent": os.getpid(),
        }
        self.pid = _zygote.fork(request, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]


def run(
    command: Sequence[str | os.PathLike[str]], *, timeout: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as :func:`subprocess.run` does, with the output as text."""
    process = Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def of_the_interpreter(environment: Any) -> dict[str, str]:
    """Return the variables that an interpreter or its loader reads when it starts (and those that
    it sets: LC_CTYPE, if no locale is set).

    coverage.py installs itself, and its handler of SIGTERM, if it finds its own variables.
    """
    return {
        key: value
        for key, value in environment.items()
        if key.startswith(("PYTHON", "COVERAGE_", "LD_", "LC_", "LANG"))
    }


def _umask() -> int:
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return int(status["Umask"], 8)


ENVIRONMENT = dict(os.environ)
"""The environment of the zygote, which does not change when a test sets a variable."""


class _Zygote:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """Return the pid of a process that has everything that the request demands and is about to
        run its module.
        """
        with self._lock:
            if self._socket is None:
                self._socket = self._start()
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(64)
        if not answer:
            raise RuntimeError("the zygote has ended: see its message on standard error")
        return int(answer)

    def _start(self) -> socket.socket:
        if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.zygote", str(theirs.fileno())],
                cwd=TREE,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Without the variable numpy would start threads.
                env={**ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"},
            )
        ours.settimeout(ANSWER_TIMEOUT_S)

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
        return ours


_zygote = _Zygote()


# ---- the zygote's side ----
def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request.  Returns the request in the process that has to run it, and ``None``
    at the end.
    """
    while True:
        data, descriptors, _flags, _address = socket.recv_fds(control, MAX_REQUEST, MAX_FDS)
        if not data:
            return None
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            if os.fork():
                os.kill(
                    middle, signal.SIGKILL
                )  # at once, because the exit handlers do not concern this process
            request: dict[str, Any] = json.loads(data)
            _become(request, descriptors, control.detach(), middle)
            return request
        for fd in descriptors:
            os.close(fd)
        os.waitpid(middle, 0)


def _become(request: dict[str, Any], descriptors: list[int], control: int, middle: int) -> None:
    """Make this process what the request demands, and answer the request with its pid."""
    while os.getppid() == middle:
        time.sleep(0.0002)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != request["parent"]:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    if request["group"] >= 0:
        os.setpgid(0, request["group"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    os.umask(request["umask"])
    wanted = request["descriptors"]
    above = max(wanted) + 1
    control, *descriptors = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (control, *descriptors)
    ]
    for fd, number in zip(descriptors, wanted, strict=True):
        os.dup2(fd, number)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in wanted and fd != control:
            # The descriptor of the listing itself is closed already.
            with contextlib.suppress(OSError):
                os.close(fd)
    sys.stdin = sys.__stdin__ = _stream(sys.stdin, 0, "r")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(sys.stdout, 1, "w")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(sys.stderr, 2, "w")  # type: ignore[misc]
    with socket.socket(fileno=control) as answer:
        answer.send(str(os.getpid()).encode())


def _stream(old: Any, fd: int, mode: str) -> Any:
    """Return the stream that an interpreter makes of a descriptor when it starts."""
    direct = mode == "w" and old.write_through
    binary = open(fd, mode + "b", buffering=0 if direct else -1, closefd=False)  # noqa: SIM115
    by_line = not direct and (fd == 2 or os.isatty(fd))
    stream: Any = io.TextIOWrapper(
        binary, old.encoding, old.errors, newline="\n", line_buffering=by_line, write_through=direct
    )
    stream.mode = mode
    return stream


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for module in PRELOADED:
        try:
            importlib.import_module(module)
        except ImportError:
            if "libxenctrl" not in module:  # libxenctrl is built only on hosts with Xen's libraries
                raise
    event_loop.install()
    del os.environ["OPENBLAS_NUM_THREADS"]
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"the zygote has {len(threads)} threads and cannot fork")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    request = serve(control)
    if request is None:
        return
    _python, _option, module, *arguments = request["command"]
    sys.orig_argv, sys.argv = request["command"], ["-m", *arguments]
    sys.path[0] = request["directory"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
