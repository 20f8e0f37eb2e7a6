# SPDX-License-Identifier: GPL-2.0-or-later
"""What checksums, TLS and ``--protect`` cost."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import trustme

from tests.bench.runs import GIB, Limits, median, migrate, row
from xenbackend.simulated.guest import GuestSpec


@contextlib.contextmanager
def tls_config() -> Iterator[str]:
    """Yield a configuration with an authority and a certificate of its own."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory() as directory:
        files = {name: f"{directory}/{name}" for name in ("certificate", "key", "authority")}
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(files["certificate"], append=True)
        certificate.private_key_pem.write_to_path(files["key"])
        authority.cert_pem.write_to_path(files["authority"])
        lines = [f'{name} = "{path}"' for name, path in files.items()]
        yield "\n".join(["[tls]", *lines, 'peers = ["127.0.0.1"]\n'])


def safety(_limits: Limits, runs: int) -> None:
    spec = GuestSpec("guest", GIB, 2, "random")
    with tls_config() as tls:
        ways: dict[str, dict[str, Any]] = {
            "plain": {}, "checksums": {"config": "[network]\nchecksums = true\n"},
            "TLS": {"config": tls}, "--protect, every 0.25 s": {"checkpoint_every_s": 0.25},
        }  # fmt: skip
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, request in ways.items():
                results[way].append(migrate(spec, strategy="hybrid", **request))
    plain = median([r["total_s"] for r in results["plain"]])
    for way, those in results.items():
        total, down = (median([r[key] for r in those]) for key in ("total_s", "downtime_s"))
        fault, longest = (median([r["guest"][key] for r in those]) for key in ("p50_us", "max_us"))
        text = (
            f"{total:.2f} s, downtime {down * 1000:.1f} ms, fault {fault:.0f} us, "
            f"longest {longest / 1000:.1f} ms"
        )
        made = [r["checkpoints"] for r in those]
        kept, pages, pause = (
            median([c[key] for c in made]) for key in ("kept", "pages", "longest_pause_s")
        )
        protected = (
            f"{kept:.0f} checkpoints, {pages:.0f} pages, longest pause {pause * 1000:.0f} ms"
            if kept
            else ""
        )
        row(f"hybrid, {way}", total / plain, text, protected)
