# SPDX-License-Identifier: GPL-2.0-or-later
"""The package in a dom0 that runs systemd: it is installed, used for a migration, and removed.  The
tests run in order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.keepers import keepers
from tests.xenlab.dom0.guests import Guest, guest, xl
from tests.xenlab.dom0.package import COMMAND_TIMEOUT_S, CONFIG, HELPER, UNITS, Host
from tests.xenlab.dom0.waiting import until

pytestmark = pytest.mark.hypervisors("hosts")
SENDER_SOCKET = "/run/xen-postcopy/sender.sock"
"""The receiver, which the test stops, would be started again by a connection to its socket, and an
emulated dom0 takes longer for that than a command waits for an answer.
"""
HERE = Host()
run, property_of, wait_until_active = HERE.run, HERE.unit_property, HERE.wait_until_active


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    HERE.install()


def test_the_units_start_and_are_well_formed() -> None:
    for unit in UNITS:
        assert property_of(unit, "NotifyAccess") == "main"
        assert (
            "waiting for migrations" in (text := property_of(unit, "StatusText"))
            or "listening at" in text
        )
        print(run("systemd-analyze", "security", unit))
    found = run("systemd-analyze", "--man=no", "verify", *UNITS, "xen-postcopy.target").splitlines()
    newer = ("'RestartSteps'", "'RestartMaxDelaySec'")  # settings of systemd 254; Debian 12 has 252
    assert [line for line in found if not any(key in line for key in newer)] == []
    assert "PHASE" in run("xen-postcopy", "list")
    assert "ready" in run("xen-postcopy", "preflight")
    assert "LIBXL_SAVE_HELPER" in run(HELPER, "--help")
    assert Path("/run/xen-postcopy/sender.sock").stat().st_mode & 0o777 == 0o600


def test_they_survive_a_restart() -> None:
    pids = [property_of(unit, "MainPID") for unit in UNITS]
    run("systemctl", "restart", *UNITS)
    wait_until_active()
    assert not set(pids) & {property_of(unit, "MainPID") for unit in UNITS}
    assert "PHASE" in run("xen-postcopy", "list")


def test_the_watchdog_is_fed() -> None:
    for unit in UNITS:
        fed = property_of(unit, "WatchdogTimestampMonotonic")
        assert int(fed) > 0
        until(
            lambda: property_of(unit, "WatchdogTimestampMonotonic") != fed,
            "the watchdog is not fed",
        )


def test_a_wrong_configuration_is_named_with_file_key_and_reason() -> None:
    config = Path(CONFIG)
    text = config.read_text()
    try:
        config.write_text('[sender]\nlisten = "0.0.0.0:8014"\n')
        run("systemctl", "restart", UNITS[0], ok=False)
        said = run("journalctl", "-u", UNITS[0], "-n", "20")
        assert (
            "/etc/xen-postcopy/config.toml: [sender] listen: 0.0.0.0 can be reached by others"
            in said
        )
    finally:
        config.write_text(text)
        run("systemctl", "reset-failed", UNITS[0], ok=False)
        run("systemctl", "restart", UNITS[0])
        wait_until_active()


def test_systemd_leaves_the_keeper_of_a_sender_that_is_killed() -> None:
    config = Path(CONFIG)
    text = config.read_text()
    try:
        config.write_text(text + '[migration]\nstrategy = "postcopy"\nbandwidth = "4M"\n')
        run("systemctl", "restart", UNITS[0])
        wait_until_active()
        with guest("kept") as made:
            made.wait_for_heartbeats(2)
            said = run(
                "xl", "migrate", "-s", "", "kept", "xl migrate-receive",
                LIBXL_SAVE_HELPER=HELPER, XEN_POSTCOPY="require",
            )  # fmt: skip
            assert "Migration successful" in said
            before, (keeper,) = property_of(UNITS[0], "MainPID"), keepers()
            run("systemctl", "kill", "-s", "KILL", "--kill-whom=main", UNITS[0])
            until(lambda: property_of(UNITS[0], "MainPID") not in ("0", before), "no successor")
            assert keepers() == [keeper]
            until(lambda: not keepers(), "the keeper lives")
            beats = Guest("kept--incoming", int(xl("domid", "kept"))).wait_for_heartbeats(3)
            assert [beat.errors for beat in beats] == [0] * len(beats)
            (line,) = json.loads(run("xen-postcopy", "list", "--json", "--socket", SENDER_SOCKET))
            assert line["phase"] == "completed"
    finally:
        config.write_text(text)
        run("systemctl", "restart", UNITS[0])
        wait_until_active()


def test_xl_migrates_and_a_daemon_that_is_stopped_says_what_it_waits_for() -> None:
    with guest("packaged") as made:
        made.wait_for_heartbeats(2)
        said = run(
            "xl", "migrate", "-s", "", "packaged", "xl migrate-receive",
            LIBXL_SAVE_HELPER=HELPER, XEN_POSTCOPY="require", XEN_POSTCOPY_STRATEGY="postcopy",
        )  # fmt: skip
        assert "Migration successful" in said
        run("systemctl", "stop", "--no-block", UNITS[1])
        until(
            lambda: "need their pager" in property_of(UNITS[1], "StatusText"),
            "it does not say what it waits for",
        )
        assert "packaged" in property_of(UNITS[1], "StatusText")
        until(lambda: property_of(UNITS[1], "ActiveState") == "inactive", "it does not end")
        arrived = Guest("packaged--incoming", int(xl("domid", "packaged")))
        beats = arrived.wait_for_heartbeats(3)
        assert [beat.errors for beat in beats] == [0] * len(beats)
        (line,) = json.loads(run("xen-postcopy", "list", "--json", "--socket", SENDER_SOCKET))
        assert line["phase"] == "completed"
        told = run("journalctl", f"XEN_POSTCOPY_MIGRATION={line['id']}")
        assert "runs at the destination" in told and "completed" in told
        shown = run("xen-postcopy", "show", line["id"][:8], "--socket", SENDER_SOCKET)
        assert "completed" in shown


@pytest.mark.timeout(2 * COMMAND_TIMEOUT_S + 600)
def test_an_upgrade_restarts_the_daemons_that_no_guest_needs() -> None:
    config = Path(CONFIG)
    text = config.read_text()
    try:
        config.write_text(text + '[migration]\nstrategy = "postcopy"\nbandwidth = "1M"\n')
        run("systemctl", "restart", *UNITS)
        wait_until_active()
        with guest("upgraded") as made:
            made.wait_for_heartbeats(2)
            run(
                "xl", "migrate", "-s", "", "upgraded", "xl migrate-receive",
                LIBXL_SAVE_HELPER=HELPER, XEN_POSTCOPY="require",
            )  # fmt: skip
            run("xen-postcopy", "pause", "upgraded")  # an upgrade takes minutes here
            before = [property_of(unit, "MainPID") for unit in UNITS]
            printed = HERE.upgrade()
            assert printed.count("because guests need it: upgraded") == 2, printed
            assert [property_of(unit, "MainPID") for unit in UNITS] == before
            run("xen-postcopy", "resume", "upgraded")
            run("systemctl", "stop", "--no-block", UNITS[1])  # until no guest needs it
            inactive = ("inactive", "failed")
            until(lambda: property_of(UNITS[1], "ActiveState") in inactive, "it does not end")
            printed = HERE.upgrade()
            assert f"{UNITS[0]} was restarted" in printed, printed
            assert property_of(UNITS[0], "MainPID") not in before
    finally:
        config.write_text(text)
        run("systemctl", "restart", *UNITS)
        wait_until_active()


def test_it_is_taken_away() -> None:
    run("systemctl", "start", "xen-postcopy.target")
    wait_until_active()
    HERE.purge()
    assert not Path("/usr/bin/xen-postcopy").exists()
    for unit in UNITS:
        assert property_of(unit, "ActiveState") in ("inactive", "failed")
