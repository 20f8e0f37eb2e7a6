# SPDX-License-Identifier: GPL-2.0-or-later
"""A program that prints what a process finds when it starts, as JSON, and that ends as its first
argument demands.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path


def found() -> dict[str, object]:
    main = sys.modules["__main__"]
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    descriptors = {
        fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))
    }
    umask = os.umask(0)
    os.umask(umask)
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "main": (
            main.__name__,
            main.__package__,
            main.__spec__ and main.__spec__.name,
            sys.path[0],
        ),
        # readline puts the size of the terminal into the environment of a process that does not ask
        # for it.
        "environment": {
            key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")
        },
        "directory": os.getcwd(),
        "descriptors": sorted(
            fd for fd, path in descriptors.items() if not path.startswith("/proc/")
        ),
        "streams": [
            (stream.encoding, stream.errors, stream.line_buffering, stream.mode, stream.isatty())
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "parent": os.getppid(),
        "leads its group": os.getpgid(0) == os.getpid() or os.getpgid(0),
        "session": os.getsid(0) == os.getpid() or os.getsid(0),
        "signals": [status[key] for key in ("SigBlk", "SigIgn", "SigCgt")],
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "limits": [
            resource.getrlimit(which) for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
        ],
        "priority": (
            os.getpriority(os.PRIO_PROCESS, 0),
            os.sched_getscheduler(0),
            sorted(os.sched_getaffinity(0)),
        ),
        "threads": [thread.name for thread in threading.enumerate()],
        "umask": umask,
        "collects": gc.isenabled(),
    }


def main() -> None:
    ending = sys.argv[1]
    print(json.dumps({**found(), "read": sys.stdin.read()}))
    sys.stdout.flush()
    print("to standard error", file=sys.stderr)
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "raise":
        raise ValueError("raised")
    if ending == "wait":
        signal.pause()
    if ending == "status":
        sys.exit(int(sys.argv[2]))
    if ending == "text":
        sys.exit("ended with a text")


if __name__ == "__main__":
    main()
