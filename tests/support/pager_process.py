# SPDX-License-Identifier: GPL-2.0-or-later
"""A pager that serves a domain's faults from a file, in a process of its own, so that it can be
killed.

It prints ``ready`` when it has the ring, and ``served N`` after each answer.  After a line on its
standard input it loads all pages that are still paged out, gives the ring up, and prints ``done``.
"""

from __future__ import annotations

import argparse
import mmap
import select
import sys
from pathlib import Path

import numpy as np

from xenbackend.choose import open_hypervisor
from xenbackend.pages import PAGE_SIZE


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulated", type=Path)
    parser.add_argument("--attach", action="store_true", help="the ring of a pager that has died")
    parser.add_argument("domid", type=int)
    parser.add_argument("contents", type=Path, help="the page of a pfn is at its number times 4096")
    parser.add_argument("out", type=Path, help="numpy array of the pfns that are paged out")
    options = parser.parse_args()
    domain = open_hypervisor(options.simulated).open(options.domid)
    ring = domain.paging_attach() if options.attach else domain.paging_enable()
    with options.contents.open("rb") as file:
        contents = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print("ready", flush=True)
    served = 0

    def serve() -> int:
        nonlocal served
        requests = ring.requests()
        for request in requests:
            at = request.pfn * PAGE_SIZE
            domain.load(np.array([request.pfn], dtype=np.uint64), contents[at : at + PAGE_SIZE])
            # Answer one at a time, the last one first, so that slots are answered in another order
            # than that of the requests.
        for request in reversed(requests):
            ring.respond([request])
            served += 1
            print(f"served {served}", flush=True)
        return len(requests)

    poll = select.poll()
    poll.register(ring, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    serve()
    while not any(fd == sys.stdin.fileno() for fd, _event in poll.poll()):
        serve()
    pages = np.frombuffer(contents, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    for batch in np.array_split(np.load(options.out), 256):
        domain.load(batch, pages[batch].tobytes())
        serve()
    domain.pause()
    serve()
    domain.paging_disable()
    domain.unpause()
    print("done", flush=True)


if __name__ == "__main__":
    main()
