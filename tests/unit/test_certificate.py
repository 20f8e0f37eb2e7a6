# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong with a host's own certificate and key is named before a peer finds it."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme

from migrate.cli.authority import Authority
from migrate.errors import MigrationError
from migrate.lanes.certificate import findings
from migrate.lanes.tls import Tls, comparable
from migrate.service import host
from migrate.service.config import Config, SenderConfig, TlsConfig
from migrate.service.host import credentials, reachable_sender, watch_credentials
from tests.support.waiting import WAIT_S, until_async

NOW = datetime.datetime.now(datetime.UTC)
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
AUTHORITY = Authority.make(LONG_AGO)
Make = Callable[..., Tls]


def in_folder(folder: Path) -> Tls:
    return Tls(folder / "host.pem", folder / "host.key", folder / "authority.pem", ("host2",))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(
        names: tuple[str, ...] = ("host1",), *, by: Authority = AUTHORITY, days: int = 365,
        now: datetime.datetime = NOW, trusts: Authority = AUTHORITY,
    ) -> Tls:  # fmt: skip
        issued = by.issue(names, days, now)
        tls = in_folder(tmp_path)
        tls.certificate.write_bytes(issued.certificate)
        tls.key.write_bytes(issued.key)
        tls.key.chmod(0o600)
        tls.authority.write_bytes(trusts.certificate())
        return tls

    return write


class Endless(Authority):
    """Signs certificates beyond its own end."""

    until = NOW + datetime.timedelta(days=3650)


def test_a_good_certificate_has_no_findings(make: Make) -> None:
    assert findings(make(("host1", "fd00::1")), "FD00:0::1") == []
    assert findings(make(("host1",)), "HOST1") == []


@pytest.mark.parametrize(
    ("how", "fatal", "what"),
    [
        ({"now": LONG_AGO, "days": 1}, True, "it has expired on 2020-01-02: renew it"),
        (
            {"now": NOW + datetime.timedelta(days=9)},
            True,
            f"it is valid from {NOW + datetime.timedelta(days=8):%Y-%m-%d} on, and this host's "
            "clock has",
        ),
        ({"days": 10}, False, f"it expires on {NOW + datetime.timedelta(days=10):%Y-%m-%d}: renew"),
        ({"trusts": Authority.make(NOW)}, True, "peers with this authority do not accept it: "),
        (
            dict.fromkeys(
                ("by", "trusts"), Endless.make(datetime.datetime(2010, 1, 1, tzinfo=datetime.UTC))
            ),
            True,
            "authority.pem: it has expired or is not valid yet",
        ),
        ({"names": ("host9",)}, False, "it is for host9, until "),
    ],
    ids=["expired", "not yet valid", "soon", "another authority", "authority", "another name"],
)
def test_a_certificate_that_peers_refuse_is_named(
    make: Make, how: dict[str, object], fatal: bool, what: str
) -> None:
    (finding,) = findings(make(**how), "host1")
    assert what in finding.text and finding.is_fatal is fatal


def test_a_certificate_without_a_name_that_a_peer_can_check(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("somebody@example.org")
    tls = in_folder(tmp_path)
    issued.cert_chain_pems[0].write_to_path(tls.certificate)
    issued.private_key_pem.write_to_path(tls.key)
    authority.cert_pem.write_to_path(tls.authority)
    tls.key.chmod(0o600)
    (finding,) = findings(tls)
    assert finding.is_fatal and "it has no name that a peer can check" in finding.text


@pytest.mark.parametrize(("mode", "is_named"), [(0o600, False), (0o644, True), (0o620, True)])
def test_a_key_that_others_can_use_is_named(make: Make, mode: int, is_named: bool) -> None:
    tls = make()
    tls.key.chmod(mode)
    found = [finding.text for finding in findings(tls)]
    assert bool(found) is is_named
    if is_named:
        assert f"(mode {mode:04o}): chmod 600 {tls.key}" in found[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_key_of_another_user_is_named(make: Make) -> None:
    tls = make()
    os.chown(tls.key, 1234, -1)
    (finding,) = findings(tls)
    assert "it belongs to user 1234: chown root" in finding.text
    os.chown(tls.key, 0, 0)
    tls.key.chmod(0o640)
    assert findings(tls) == []  # of a group to which root gives its keys
    tls.key.unlink()
    with pytest.raises(MigrationError, match=r"host\.key.*: No such file"):
        findings(tls)


def config(tls: Tls, sender: SenderConfig) -> Config:
    section = TlsConfig(str(tls.certificate), str(tls.key), str(tls.authority), tls.peers)
    return Config(tls=section, sender=sender)


def test_the_name_counts_by_which_receivers_dial_the_sender(make: Make) -> None:
    here = SenderConfig()
    assert reachable_sender(Config(sender=here)) is None
    assert credentials(config(make(), here)) == []
    there = SenderConfig(("0.0.0.0", 8014), "host9")
    assert reachable_sender(Config(sender=there)) == ("host9", 8014)
    (finding,) = credentials(config(make(), there))
    assert "dial host9: make one with that name, or set address in [sender]" in finding.text
    assert credentials(Config()) == []


async def test_a_daemon_names_it_at_its_start_and_continues(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "EVERY_S", 0)
    tls = make(now=LONG_AGO, days=1)
    tls.key.chmod(0o644)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_credentials, config(tls, SenderConfig()))
        await until_async(lambda: len(caplog.records) >= 4)
        nursery.cancel_scope.cancel()
    levels = [record.levelno for record in caplog.records]
    assert levels[:4] == [logging.ERROR, logging.WARNING] * 2
    assert "it has expired on 2020-01-02" in caplog.text and "chmod 600" in caplog.text
    with trio.fail_after(WAIT_S):
        await watch_credentials(Config())


def test_equal_names_are_equal_texts() -> None:
    assert comparable("FD00:0:0:0:0:0:0:2\n") == comparable("fd00::2") == "fd00::2"
    assert comparable("Host1") == "host1"
