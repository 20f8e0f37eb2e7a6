# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests with a device model (QEMU), migrated by xl: disk, CD and screen work, and a device model
that ends or does not start leaves the guest in one place.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.xenlab.dom0.devices import check_disk, script
from tests.xenlab.dom0.guests import FROM_DISK, HVM, STEPS_PER_S, Guest, guest, xl
from tests.xenlab.dom0.host import Host, arrived, check_heartbeat, host, running, slow
from tests.xenlab.dom0.hvm import (
    NO_SCREEN,
    SCREEN,
    Screen,
    cd,
    device_model,
    device_models,
    disk_of_device_model,
)
from tests.xenlab.dom0.waiting import until

__all__ = ["host", "running", "slow"]

pytestmark = pytest.mark.hypervisors("paging")
OPTIONS = f"rate={STEPS_PER_S} pages=6000"
DEVICE_MODEL = "/usr/libexec/xen-qemu-system-i386"
NO_START = """#!/bin/sh
# A device model that starts no incoming guest.
case " $* " in
    *" -incoming "*) echo "no device model for an incoming guest" >&2; exit 1 ;;
esac
exec {program} "$@"
"""


@contextmanager
def guest_with_screen(name: str) -> Iterator[Guest]:
    """Yield a guest with a disk, a CD and a screen, which its program uses all the time."""
    with ExitStack() as stack:
        disks = [stack.enter_context(disk_of_device_model(name)), stack.enter_context(cd(name))]
        devices = ", ".join(f'"{disk}"' for disk in disks)
        made = stack.enter_context(
            guest(
                name,
                kind=HVM,
                extra=f"disk = [{devices}]\n{SCREEN}",
                options=f"{OPTIONS} disk=2 buffers=128 cd=1 screen=1",
            )
        )
        made.wait_for_requests(10)
        made.wait_for_cd(5)
        yield made


def check_devices(guest: Guest) -> None:
    check_disk(guest)
    use = guest.wait_for_cd(5)
    assert (use.errors, use.mismatches) == (0, 0)
    check_heartbeat(guest)


def watch(guest: Guest) -> None:
    with closing(Screen(guest.domid)) as screen:
        screen.wait_for_changes(3)


@pytest.mark.parametrize("strategy", ["hybrid", "postcopy"])
def test_a_guest_with_disk_cd_and_screen_arrives(running: Host, strategy: str) -> None:
    with guest_with_screen("hvm1") as made:
        watch(made)
        running.migrate("hvm1", XEN_POSTCOPY_STRATEGY=strategy)
        now = arrived("hvm1")
        with closing(Screen(now.domid)) as screen:
            screen.wait_for_changes(3)
            check_devices(now)
            running.wait_for("completed")
            screen.wait_for_changes(3)
        check_devices(now)
        assert device_models() == [device_model(now.domid)]
        running.check_clean("hvm1")


def test_a_guest_that_its_firmware_has_booted_from_a_disk_arrives(running: Host) -> None:
    with (
        disk_of_device_model("hvm2", boots=True) as disk,
        guest("hvm2", kind=FROM_DISK, extra=f'disk = ["{disk}"]\n{NO_SCREEN}') as made,
    ):
        made.wait_for_heartbeats(2)
        running.migrate("hvm2", XEN_POSTCOPY_STRATEGY="postcopy")
        now = arrived("hvm2")
        check_heartbeat(now)
        running.wait_for("completed")
        check_heartbeat(now)
        running.check_clean("hvm2")


def test_a_device_model_that_is_killed_while_pages_are_missing(slow: Host) -> None:
    """All pages arrive, and the guest is in one place.  Whether it runs on depends on Xen: a vCPU
    that uses an emulated device waits for the device model for ever.
    """
    with guest("hvm3", kind=HVM, extra=NO_SCREEN, options=OPTIONS) as made:
        made.wait_for_heartbeats(2)
        slow.migrate_but_few_pages("hvm3")
        now = arrived("hvm3")
        now.wait_for_heartbeats(1)
        os.kill(device_model(now.domid), signal.SIGKILL)
        until(lambda: not device_models(), "a device model lives")
        slow.complete()
        assert now.heartbeats()[-1].errors == 0
        slow.check_clean("hvm3")


@pytest.mark.parametrize("strategy", ["hybrid", "postcopy"])
def test_a_device_model_that_does_not_start_leaves_the_guest_at_its_source(
    running: Host, tmp_path: Path, strategy: str
) -> None:
    name = f"hvm4-{strategy}"
    override = script("device-model", NO_START.format(program=DEVICE_MODEL))
    extra = f'device_model_override = "{override}"\n{NO_SCREEN}'
    with guest(name, kind=HVM, extra=extra, options=OPTIONS) as made:
        made.wait_for_heartbeats(2)
        with pytest.raises(RuntimeError):
            running.migrate(name, XEN_POSTCOPY_STRATEGY=strategy)
        assert int(xl("domid", name)) == made.domid
        check_heartbeat(made)
        assert device_models() == [device_model(made.domid)]
        running.check_clean(name)
