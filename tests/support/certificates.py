# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates for tests: valid ones, and those that must be refused."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from migrate.lanes.tls import Tls

AUTHORITY, ANOTHER = trustme.CA(), trustme.CA()


LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


HOST = "127.0.0.1"


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Tls]:
    made = 0

    def make(
        *names: str, signed_by: trustme.CA = AUTHORITY, trusts: trustme.CA = AUTHORITY,
        expired: bool = False, peers: tuple[str, ...] = (HOST,),
    ) -> Tls:  # fmt: skip
        nonlocal made
        made += 1
        folder = tmp_path / str(made)
        folder.mkdir()
        names = names or (HOST,)
        certificate = (
            signed_by.issue_cert(
                *names, not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=1)
            )
            if expired
            else signed_by.issue_cert(*names)
        )
        for pem in certificate.cert_chain_pems:
            pem.write_to_path(folder / "certificate", append=True)
        certificate.private_key_pem.write_to_path(folder / "key")
        trusts.cert_pem.write_to_path(folder / "authority")
        return Tls(folder / "certificate", folder / "key", folder / "authority", peers)

    return make
