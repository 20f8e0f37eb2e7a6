# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that holds pages of a domain and has a keeper, so that it can be killed.

It prints ``ready`` when it holds the pages, and then waits for the end of its standard input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from xenbackend.choose import open_hypervisor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulated", type=Path)
    parser.add_argument("domid", type=int)
    parser.add_argument("pages", type=int, help="the number of pages, from pfn 0 on")
    parser.add_argument("path", type=Path, help="where the keeper listens")
    options = parser.parse_args()
    domain = open_hypervisor(options.simulated).open(options.domid)
    pfns = np.arange(options.pages, dtype=np.uint64)
    domain.hold(pfns[: len(pfns) // 2])
    domain.keep(options.path)
    for pfn in pfns[len(pfns) // 2 :]:  # each in a mapping of its own
        domain.hold(np.array([pfn], dtype=np.uint64))
    domain.release(pfns[:1])
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
