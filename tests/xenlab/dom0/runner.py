# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that waits in a booted dom0 for the machine's one command, and runs the command.

The state of a booted machine is saved while this process waits.  Every third-party module that the
lab's tests need is imported by then, so pytest runs in a fork and imports nothing twice.  Before
the command arrives only what is on dom0's own disks exists, and no working tree.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TREE, IO, PARTS, PACKAGES = map(Path, ("/mnt/tree", "/mnt/io", "/mnt/parts", "/mnt/packages"))
SHARE_OPTIONS = "trans=virtio,version=9p2000.L,msize=262144"
OPTIONS = ("-p", "no:cacheprovider")
READY = "xenlab: the machine is ready"
RUNS = "xenlab: the command runs"
RNDRESEEDCRNG = 0x5207


def prepare() -> None:
    """Import the third-party modules: pytest with its plugins, and the project's dependencies."""
    import cffi
    import click
    import msgpack
    import numpy
    import pytest
    import trio

    del cffi, click, msgpack, numpy, trio
    empty = Path("/tmp/empty")
    empty.mkdir()
    (empty / "pytest.ini").write_text("[pytest]\n")
    with open(os.devnull, "w") as nothing:
        shown, sys.stdout = sys.stdout, nothing
        try:
            pytest.main(["-q", *OPTIONS, "--rootdir", str(empty), str(empty)])
        finally:
            sys.stdout = shown
    gc.collect()
    gc.freeze()


def be_current(now: float, entropy: str) -> None:
    """Set the clock, which stopped while the state was saved, and make random numbers differ."""
    time.clock_settime(time.CLOCK_REALTIME, now)
    with open("/dev/urandom", "wb", buffering=0) as pool:
        pool.write(bytes.fromhex(entropy))
        fcntl.ioctl(pool, RNDRESEEDCRNG)
    random.seed()


def mount_shares() -> None:
    """Mount the shared folders, and unpack the working tree into dom0's memory."""
    for tag, where, options in (("io", IO, "rw"), ("parts", PARTS, "ro,cache=loose")):
        options = f"{options},{SHARE_OPTIONS}"
        subprocess.run(["mount", "-t", "9p", "-o", options, tag, where], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tree", TREE], check=True)
    subprocess.run(["tar", "-x", "-f", IO / "tree.tar", "-C", TREE], check=True)
    subprocess.run(["mount", "-o", "remount,ro", TREE], check=True)


def run(command: dict[str, Any]) -> int:
    """Run the command in the working tree, its output in a file; return its exit status."""
    os.environ.update(
        command["environment"],
        LAB_OUT=str(IO / "out"),
        PYTHONPATH=f"{TREE}:{PACKAGES}",
        PYTHONDONTWRITEBYTECODE="1",
    )
    output = os.open(IO / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(TREE)
            status = execute(command)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    while True:  # As the first process of dom0, this one is the parent of orphans too.
        ended, status = os.wait()
        if ended == child:
            return os.waitstatus_to_exitcode(status)


def execute(command: dict[str, Any]) -> int:
    subprocess.run(["sh", "-e", "-c", command["first"]], check=True)
    if "pytest" not in command:
        os.execlp("sh", "sh", "-c", command["shell"])
    import pytest

    sys.dont_write_bytecode = True
    sys.path[:] = [str(TREE), *(path for path in sys.path if not path.startswith(str(TREE)))]
    words = map(os.path.expandvars, command["pytest"])
    return int(pytest.main([*OPTIONS, *words]))


def main() -> None:
    prepare()
    print(READY, flush=True)
    while not (line := sys.stdin.readline()).startswith("run "):
        pass
    _, now, entropy = line.split()
    be_current(float(now), entropy)
    mount_shares()
    print(RUNS, flush=True)
    status = run(json.loads((IO / "command").read_text()))
    for log in Path("/var/log/xen").glob("guest-*.log"):
        shutil.copy(log, IO / "out")
    with open(IO / "hypervisor.log", "wb") as said:
        subprocess.run(["xl", "dmesg"], stdout=said, stderr=said, check=False)
    unfinished = IO / "status.unfinished"
    unfinished.write_text(f"{status}\n")
    unfinished.rename(IO / "status")  # The process that waits for this file ends the machine.
    time.sleep(60)


if __name__ == "__main__":
    main()
