# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations as xl makes them: two helpers, two daemons, two simulated hosts, and a scripted libxl
at each end.

The tests do what xl does after its helpers: they let the guest run at one end and destroy it at the
other.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from migrate.cli.world import wait_for_steps
from migrate.errors import MigrationError
from migrate.xl import image
from migrate.xl.protocol import Message
from tests.conftest import MIB
from tests.support.labs import until
from tests.support.libxl import Libxl
from tests.support.xl import (
    CBFLAGS_SAVE,
    SHORT_OF_PATIENCE,
    Xl,
    check_arrived,
    check_stayed,
    owed,
    xl,
)
from xenbackend.contract import DomainState
from xenbackend.errors import NoSuchDomainError

__all__ = ["xl"]


@pytest.mark.parametrize("strategy", ["hybrid", "postcopy", "precopy"])
def test_a_guest_is_migrated(xl: Xl, strategy: str) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = strategy
    assert xl.run() == ((0, 0), (0, 0))
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    kinds = [message.kind for message in xl.save.messages]
    assert [kind for kind in kinds if kind is not Message.PROGRESS] == [
        Message.SWITCH_QEMU_LOGDIRTY, Message.SUSPEND, Message.SWITCH_QEMU_LOGDIRTY,
        Message.COMPLETE,
    ]  # fmt: skip
    assert [message.kind for message in xl.restore.messages] == [
        Message.STATIC_DATA_DONE, Message.RESTORE_RESULTS, Message.COMPLETE,
    ]  # fmt: skip
    assert xl.restore.of(Message.RESTORE_RESULTS)[0].numbers == xl.destination.toolstack_gfns()
    assert xl.line("sender")["peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("world", ['[migration]\nbandwidth = "8M"\n'], indirect=True)
def test_pages_are_served_long_after_the_source_is_gone(xl: Xl) -> None:
    """The guest runs and faults on pages that only the mappings of the sender still have."""
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "postcopy"
    assert xl.run() == ((0, 0), (0, 0))
    xl.source.destroy()
    xl.wait_for("postcopy", "postcopy")
    xl.destination.start()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.parametrize("strategy", ["hybrid", "postcopy", "precopy"])
def test_a_guest_that_is_left_paused_gets_its_memory(xl: Xl, strategy: str) -> None:
    """``xl migrate -p``: the guest may be unpaused much later, and until then its pages would
    depend on one process.
    """
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = strategy
    assert xl.run() == ((0, 0), (0, 0))
    xl.source.destroy()
    xl.wait_for("completed", "completed")
    assert xl.destination.info().state is DomainState.INCOMING
    assert not len(xl.destination.paged_out())
    xl.destination.start()
    check_arrived(xl)


def test_the_guest_may_run_before_its_source_is_gone(xl: Xl) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "postcopy"
    assert xl.run() == ((0, 0), (0, 0))
    xl.destination.start()
    wait_for_steps(xl.destination, 500)
    assert xl.line("sender")["phase"] == "deciding"
    xl.source.destroy()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


def test_an_xl_that_takes_long_to_destroy_the_source_is_left_to_it(xl: Xl) -> None:
    """xl's hotplug scripts take long; the guest runs, and its pages arrive meanwhile."""
    assert xl.run() == ((0, 0), (0, 0))
    xl.destination.start()
    until(lambda: not len(xl.destination.paged_out()), "no pages come")
    assert xl.source.info().state is DomainState.SUSPENDED
    assert xl.line("sender")["phase"] == "deciding"
    xl.source.destroy()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


# ---- the guest is saved, or sent on, while memory is missing ----
SLOW = '[migration]\nstrategy = "postcopy"\npostcopy_bandwidth = "64K"\n'
"""Nearly all pages are missing until :func:`send_faster`, however late a test acts."""


def send_faster(xl: Xl) -> None:
    values = {"postcopy_bandwidth_bytes_per_s": 8 * MIB}
    xl.world.ask("sender", command="set", migration=xl.spec.name, values=values)


def save_at_destination(xl: Xl, io_fd: int, *, live: bool, **environment: str) -> Libxl:
    numbers = (-1, xl.destination.domid, int(live), CBFLAGS_SAVE, 0)
    helper = Libxl(
        "--save-domain", os.dup(io_fd), numbers, {}, {**xl.save.environment, **environment}
    )
    helper.environment["XEN_POSTCOPY_SENDER"] = "/nowhere"
    helper.start()
    return helper


@pytest.mark.parametrize("world", [SLOW], indirect=True)
@pytest.mark.parametrize("how", ["to a file", "off", "onward"])
def test_a_guest_that_lacks_pages_is_saved_when_it_has_them(
    xl: Xl, tmp_path: Path, how: str
) -> None:
    """libxc takes missing pages for holes, and reports no error."""
    assert xl.run() == ((0, 0), (0, 0))
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    assert len(xl.destination.paged_out())
    with (tmp_path / "image").open("wb") as file:
        how_to = {"XEN_POSTCOPY": "off"} if how == "off" else {}
        helper = save_at_destination(xl, file.fileno(), live=how == "onward", **how_to)
        until(lambda: bool(helper.of(Message.PROGRESS)), "there is no progress message")
        assert not file.tell()
        send_faster(xl)
        assert helper.wait() == 0
    assert helper.result == (0, 0)
    assert "waiting for its memory to arrive" in helper.of(Message.PROGRESS)[0].texts
    assert not len(xl.destination.paged_out())
    assert (tmp_path / "image").stat().st_size
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.parametrize("world", [SLOW], indirect=True)
@pytest.mark.parametrize("slowly", [False, True])
def test_the_pages_of_a_guest_that_another_program_saved_are_kept(xl: Xl, slowly: bool) -> None:
    """libvirt, or xl without our helper, saves the guest.  The image has holes, and the program
    that made it has destroyed the guest.

    The pages are also kept if they arrived while the image was written, because it is unknown which
    of them the image has.
    """
    assert xl.run() == ((0, 0), (0, 0))
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.destination.suspend()
    if slowly:
        send_faster(xl)
        until(lambda: not len(xl.destination.paged_out()), "the pages do not come")
        assert xl.line("sender")["outstanding"]
    xl.destination.destroy()
    for daemon, phase in (("sender", "interrupted"), ("receiver", "failed")):
        lacks = "an image or a copy that was made of it then lacks them"
        until(lambda: lacks in xl.line(daemon)["problem"], "the problem is not shown")
        assert xl.line(daemon)["phase"] == phase
    assert "xen-postcopy decide" in xl.line("sender")["problem"]
    with pytest.raises(MigrationError, match="xl has destroyed the domain here"):
        xl.world.ask("sender", command="decide", migration=xl.spec.name, here=True)
    xl.world.ask("sender", command="decide", migration=xl.spec.name, here=False)
    xl.wait_for("failed", "failed")
    until(lambda: not owed(xl), "the sender waits for a destination that has ended")
    assert "not been informed" not in xl.line("sender")["problem"]


@pytest.mark.parametrize("world", [SLOW], indirect=True)
def test_a_guest_that_is_paused_gets_its_memory_and_stays_paused(xl: Xl) -> None:
    """``xl pause`` while pages are missing.  The ring is given up nevertheless."""
    assert xl.run() == ((0, 0), (0, 0))
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.destination.pause()
    assert xl.line("receiver")["outstanding"]
    send_faster(xl)
    xl.wait_for("completed", "completed")
    assert xl.destination.state() is DomainState.PAUSED
    xl.destination.unpause()
    check_arrived(xl)


@pytest.mark.parametrize("world", [SLOW], indirect=True)
def test_a_guest_that_was_suspended_for_a_while_arrives(xl: Xl) -> None:
    """This happens with ``xl save -c``, or after a save that failed."""
    assert xl.run() == ((0, 0), (0, 0))
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.destination.suspend()
    send_faster(xl)
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come")
    xl.destination.resume()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


# ---- xl decides otherwise ----
def test_xl_lets_the_guest_stay_after_the_helpers(xl: Xl) -> None:
    assert xl.run() == ((0, 0), (0, 0))
    xl.stay()
    xl.wait_for("failed", "failed")
    check_stayed(xl)


def test_xl_resumes_the_source_before_it_destroys_the_destination(xl: Xl) -> None:
    assert xl.run() == ((0, 0), (0, 0))
    xl.source.resume()
    xl.wait_for("failed", "failed")
    xl.destination.destroy()
    check_stayed(xl)


def test_xl_gives_up_at_the_destination_and_leaves_the_source_suspended(xl: Xl) -> None:
    """xl's exchange was cut before "go" arrived: "domain state is now undefined"."""
    assert xl.run() == ((0, 0), (0, 0))
    xl.source.rename(xl.spec.name + "--migratedaway")
    xl.destination.destroy()
    until(lambda: xl.source.info().state is DomainState.RUNNING, "the guest is not resumed")
    assert xl.source.info().name == xl.spec.name
    xl.wait_for("failed", "failed")
    check_stayed(xl)


def test_a_guest_that_ran_for_a_moment_at_the_destination_is_not_resumed(xl: Xl) -> None:
    """The receiver polls the domain's state, and has not seen the guest run.  xl ends without a
    decision for the source.
    """
    xl.save.ends_with_helper = True
    assert xl.run() == ((0, 0), (0, 0))
    receiver = xl.world.processes["receiver"].popen
    receiver.send_signal(signal.SIGSTOP)
    xl.destination.start()
    xl.destination.destroy()
    receiver.send_signal(signal.SIGCONT)
    xl.wait_for("failed", "failed")
    for daemon in ("sender", "receiver"):
        assert "its domain was destroyed" in xl.line(daemon)["problem"]
    with pytest.raises(NoSuchDomainError):
        xl.source.info()


def test_xl_runs_the_guest_at_the_destination_and_leaves_the_source_suspended(xl: Xl) -> None:
    """xl's exchange was cut after "go". xl prints the same, and ends."""
    xl.save.ends_with_helper = True
    assert xl.run() == ((0, 0), (0, 0))
    xl.destination.start()
    xl.wait_for("completed", "completed")
    with pytest.raises(NoSuchDomainError):
        xl.source.info()
    check_arrived(xl)


def test_a_guest_that_is_destroyed_before_its_memory_has_come(xl: Xl) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "postcopy"
    assert xl.run() == ((0, 0), (0, 0))
    xl.source.destroy()
    xl.destination.destroy()
    xl.wait_for("failed", "failed")
    for daemon in ("sender", "receiver"):
        assert "destroyed" in xl.line(daemon)["problem"]


@pytest.mark.parametrize("step", [Message.SWITCH_QEMU_LOGDIRTY, Message.SUSPEND])
def test_the_saving_libxl_dies(xl: Xl, step: Message) -> None:
    """Whatever libxl was about to do, only the daemon resumes the guest then."""
    xl.save.silent_at = step
    xl.start()
    until(lambda: bool(xl.save.of(step)), "the step is not reached")
    if step is Message.SUSPEND:
        xl.source.suspend()
    xl.save.kill()
    xl.restore.wait()
    assert xl.restore.result[0] == -1
    xl.destination.destroy()
    xl.wait_for("failed", "failed")
    check_stayed(xl)


@pytest.mark.parametrize("step", [Message.STATIC_DATA_DONE])
def test_the_restoring_libxl_dies(xl: Xl, step: Message) -> None:
    xl.restore.silent_at = step
    xl.start()
    until(lambda: bool(xl.restore.of(step)), "the step is not reached")
    xl.restore.kill()
    xl.destination.destroy()
    xl.save.wait()
    assert xl.save.result[0] == -1
    xl.wait_for("failed", "failed")
    check_stayed(xl)


def test_libxl_cannot_suspend_the_guest(xl: Xl) -> None:
    xl.save.answers[Message.SUSPEND] = lambda: 0
    assert [result for result, _errno in xl.run()] == [-1, -1]
    assert "could not suspend" in xl.save.log
    xl.stay()
    check_stayed(xl)


# ---- when it is not ours ----
def assert_stock(xl: Xl, why: str) -> None:
    assert xl.run() == ((0, 0), (0, 0))
    assert why in xl.save.log + xl.restore.log
    assert xl.restore.of(Message.RESTORE_RESULTS)[0].numbers == (1, 2)
    xl.stay()
    check_stayed(xl)


def test_without_a_daemon_here_the_stock_helper_does_it(xl: Xl) -> None:
    xl.save.environment["XEN_POSTCOPY_SENDER"] = "/nowhere"
    assert_stock(xl, "no daemon at /nowhere")


def test_a_strategy_that_there_is_not_leaves_it_to_the_stock_helper(xl: Xl) -> None:
    xl.save.environment["XEN_POSTCOPY_STRATEGY"] = "teleport"
    assert_stock(xl, "strategy 'teleport': hybrid, postcopy or precopy")


@pytest.mark.parametrize("world", [SHORT_OF_PATIENCE], indirect=True)
def test_without_a_daemon_there_the_stock_helper_does_it(xl: Xl) -> None:
    xl.restore.environment["XEN_POSTCOPY_RECEIVER"] = "/nowhere"
    assert_stock(xl, "no daemon at /nowhere")
    assert "did not reach this end" in xl.save.log


@pytest.mark.parametrize("world", [SHORT_OF_PATIENCE], indirect=True)
def test_where_only_the_sender_has_a_helper_the_stock_one_does_it(xl: Xl) -> None:
    xl.restore.environment["XEN_POSTCOPY"] = "off"
    assert_stock(xl, "did not reach this end")


def test_a_host_that_refuses_leaves_it_to_the_stock_helper(xl: Xl) -> None:
    """The preflight of that host refuses."""
    ring = xl.destination.paging_enable()
    assert xl.run() == ((0, 0), (0, 0))
    assert "in use by another pager" in xl.save.log
    xl.destination.paging_disable()
    ring.close()
    xl.stay()
    check_stayed(xl)


@pytest.mark.parametrize("side", ["save", "restore"])
def test_require_fails_where_it_would_be_the_stock_helper_s(xl: Xl, side: str) -> None:
    xl.save.environment["XEN_POSTCOPY_SENDER"] = "/nowhere"
    getattr(xl, side).environment["XEN_POSTCOPY"] = "require"
    xl.start()
    failing = getattr(xl, side)
    failing.wait()
    assert failing.result[0] == -1 and "XEN_POSTCOPY=require" in failing.log
    (xl.restore if side == "save" else xl.save).kill()
    xl.stay()
    check_stayed(xl)


def test_what_a_stock_receiver_would_read_is_refused_there() -> None:
    """The record that names the session is mandatory, and the offer is not."""
    assert not image.REC_TYPE_POSTCOPY & image.REC_TYPE_OPTIONAL
    assert image.REC_TYPE_POSTCOPY_OFFER & image.REC_TYPE_OPTIONAL
