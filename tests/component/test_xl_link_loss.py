# SPDX-License-Identifier: GPL-2.0-or-later
"""Under xl the link is lost, or a daemon is killed, while xl decides or later.  The guest is
unharmed at the end at which xl has put it.
"""

from __future__ import annotations

from random import Random

import pytest

from migrate.cli.figures import problem
from migrate.errors import MigrationError
from receiver.toolstack import GRANT_RETRY_S
from tests.support.cuttable_xl import (
    LARGE,
    SLOW_PUSH_S,
    CuttableXl,
    decide,
    log_of,
    some_have_come,
    xl,
)
from tests.support.labs import until
from tests.support.links import Link
from tests.support.xl import check_arrived, check_stayed
from xenbackend.contract import DomainState

__all__ = ["xl"]


def test_the_memory_arrives_while_xl_decides(xl: CuttableXl) -> None:
    """xl's hotplug scripts take half a minute."""
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    xl.wait_for("deciding", "deciding")
    until(lambda: not xl.line("sender")["outstanding"], "they are not confirmed")
    assert xl.destination.info().state is DomainState.INCOMING
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.sweep
@pytest.mark.parametrize("all_of_it", [False, True])
@pytest.mark.parametrize("restarted", ["", "sender", "receiver"])
def test_the_guest_stays_after_memory_has_been_pushed(
    xl: CuttableXl, restarted: str, all_of_it: bool
) -> None:
    some_have_come(xl)
    if all_of_it:
        until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    if restarted:
        xl.restart(restarted)
    xl.stay()
    xl.wait_for("failed", "failed")
    check_stayed(xl)


@pytest.mark.parametrize("restarted", ["sender", "receiver"])
def test_the_rest_of_the_memory_arrives_after_a_restart_while_xl_decides(
    xl: CuttableXl, restarted: str
) -> None:
    some_have_come(xl)
    xl.restart(restarted)
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    xl.wait_for("deciding", "deciding")
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(8))
def test_xl_decides_at_any_instant_while_memory_is_pushed(xl: CuttableXl, seed: int) -> None:
    """The decision falls among cuts and kills, and counts wherever the pages are by then."""
    random = Random(seed)
    some_have_come(xl)
    for _ in range(random.choice([1, 2])):
        missing = random.randrange(1, len(xl.destination.paged_out()) + 1)
        until(
            lambda: len(xl.destination.paged_out()) <= missing, "the pages do not come", SLOW_PUSH_S
        )
        match random.choice(["cut", "sender", "receiver"]):
            case "cut":
                xl.relay.do(Link.cut)
            case daemon:
                xl.restart(daemon)
    if random.random() < 0.3:
        xl.wait_for(
            "deciding", "deciding"
        )  # a sender has to hold the pages again before xl goes on
        xl.go()
        xl.wait_for("completed", "completed")
        check_arrived(xl)
    else:
        xl.stay()
        xl.wait_for("failed", "failed")
        check_stayed(xl)


def test_the_guest_runs_at_the_destination_while_the_link_is_down_and_nothing_is_missing(
    xl: CuttableXl,
) -> None:
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    xl.relay.do(Link.down)
    xl.wait_for("interrupted", "in doubt")
    xl.go()
    until(lambda: xl.destination.info().state is DomainState.RUNNING, "it does not run")
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    xl.wait_for("completed", "completed")
    check_arrived(xl)


def test_cut_while_xl_decides(xl: CuttableXl) -> None:
    xl.relay.do(Link.cut)
    xl.wait_for("deciding", "deciding")
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


def test_down_while_xl_lets_it_run_at_the_destination(xl: CuttableXl) -> None:
    """For a while the guest runs without the sender of its pages."""
    xl.relay.do(Link.down)
    xl.wait_for("interrupted", "in doubt")
    xl.go()
    until(lambda: xl.destination.info().state is DomainState.RUNNING, "it does not run")
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    xl.wait_for("completed", "completed")
    check_arrived(xl)


def test_down_while_xl_lets_it_stay(xl: CuttableXl) -> None:
    xl.relay.do(Link.down)
    xl.wait_for("interrupted", "in doubt")
    xl.stay()
    xl.wait_for("failed", "failed")
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    check_stayed(xl)


def test_cut_again_and_again_afterwards(xl: CuttableXl) -> None:
    xl.go()
    for _ in range(3):
        until(lambda: xl.line("receiver")["phase"] in ("postcopy", "completed"), "no postcopy")
        xl.relay.do(Link.cut)
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@LARGE
def test_the_time_that_is_left_for_disks_is_shown_while_the_link_is_lost(xl: CuttableXl) -> None:
    """dom0 gives up I/O to a page that is missing for half a minute."""
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    assert xl.line("receiver")["io_fails_in_s"] is None
    xl.relay.do(Link.down)
    until(lambda: xl.line("receiver")["phase"] == "interrupted", "the loss is not noticed")
    line = xl.line("receiver")
    assert 0 < line["io_fails_in_s"] <= GRANT_RETRY_S
    assert "its I/O to missing pages fails in" in problem(line)
    until(lambda: xl.line("receiver")["io_fails_in_s"] < line["io_fails_in_s"], "time stands still")
    assert "has failed: look for I/O errors" in problem({**line, "io_fails_in_s": 0.0})
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    xl.wait_for("completed", "completed")
    assert xl.line("receiver")["io_fails_in_s"] is None


def test_killed_while_xl_may_still_resume_what_it_has_destroyed_elsewhere(xl: CuttableXl) -> None:
    """xl has ended at both ends, and left the source suspended.  The sender gives xl some seconds
    to resume the guest, and is killed within this time.
    """
    xl.relay.do(Link.down)
    xl.wait_for("interrupted", "in doubt")
    xl.destination.destroy()
    until(lambda: xl.line("receiver")["phase"] == "failed", "the end is not noticed")
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    given_up = "migration of guest given up: the destination has given the guest up"
    until(lambda: given_up in log_of(xl, "sender"), "the sender is not informed")
    xl.restart("sender")
    check_stayed(xl)


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_killed_while_xl_decides(xl: CuttableXl, which: str) -> None:
    xl.restart(which)
    xl.wait_for("deciding", "deciding")
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_killed_while_xl_decides_and_it_stays(xl: CuttableXl, which: str) -> None:
    xl.restart(which)
    xl.wait_for("deciding", "deciding")
    xl.stay()
    xl.wait_for("failed", "failed")
    check_stayed(xl)


@LARGE
def test_a_receiver_that_is_killed_afterwards(xl: CuttableXl) -> None:
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.restart("receiver")
    xl.wait_for("completed", "completed")
    check_arrived(xl)


@pytest.mark.parametrize("taken_up", [False, True])
def test_the_guest_comes_back_when_the_destination_is_lost_while_xl_decides(
    xl: CuttableXl, taken_up: bool
) -> None:
    """xl has given up at both ends, and has left the source suspended, under another name."""
    xl.relay.do(Link.down)
    xl.source.rename(f"{xl.spec.name}--migratedaway")
    if taken_up:
        xl.restart("sender")
    xl.wait_for("interrupted", "in doubt")
    with pytest.raises(MigrationError, match=r"xl may still decide.*--force"):
        decide(xl, here=True, force=False)
    decide(xl, here=True, force=True)
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    xl.wait_for("failed", "failed")
    assert xl.source.info().name == xl.spec.name
    xl.destination.destroy()  # xl has made this domain, and has not destroyed it
    check_stayed(xl)


@pytest.mark.parametrize("state", ["deciding", "handed over"])
def test_what_is_left_of_the_source_goes_when_an_operator_decides_so(
    xl: CuttableXl, state: str
) -> None:
    xl.relay.do(Link.down)
    xl.wait_for("interrupted", "in doubt")
    if state == "handed over":
        xl.destination.start()
        until(lambda: xl.destination.info().state is DomainState.RUNNING, "it does not run")
    decide(xl, here=False, force=True)
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    until(lambda: xl.line("sender")["phase"] == "failed", "it is not carried out")
    assert xl.world.source.domains() == []
