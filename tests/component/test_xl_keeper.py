# SPDX-License-Identifier: GPL-2.0-or-later
"""Under xl a sender is killed when the guest runs at the destination.  Its successor has the pages
of the source, because a keeper holds them.
"""

from __future__ import annotations

import os
import signal

import pytest

from migrate.cli.world import start_sender
from migrate.errors import MigrationError
from tests.support.cuttable_xl import LARGE, SLOW_PUSH_S, CuttableXl, decide, log_of, sender_of, xl
from tests.support.keepers import keeper_of, keepers, lives, sockets_of_keepers
from tests.support.labs import until
from tests.support.links import Link
from tests.support.pages import pfns
from tests.support.xl import check_arrived, check_stayed, owed

__all__ = ["xl"]


@LARGE
@pytest.mark.parametrize("again", ["", "sender", "receiver"])
def test_a_sender_and_its_keeper_that_are_killed_afterwards_take_the_pages_with_them(
    xl: CuttableXl, again: str
) -> None:
    """Only their mappings keep the pages of a domain that xl has destroyed.  Both ends report the
    loss, and report no success.
    """
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    if again == "sender":  # before the sender can have reported it
        xl.relay.do(Link.down)
    xl.lose_sender()
    until(lambda: xl.line("sender")["phase"] == "failed", "the sender does not show the failure")
    assert "the pages that it lacks at the destination are lost" in xl.line("sender")["problem"]
    if again == "sender":
        xl.restart("sender")
        xl.relay.do(lambda link: setattr(link, "is_up", True))
        xl.world.ask("receiver", command="reconnect", migration=xl.spec.name)
    until(lambda: xl.line("receiver")["phase"] == "lost", "the receiver does not show the loss")
    if again == "receiver":
        xl.restart("receiver")
        until(
            lambda: "exist nowhere any more" in xl.line("receiver")["problem"],
            "its successor does not know",
        )
    line = xl.line("receiver")
    assert "pages that exist nowhere any more: destroy it (`xl destroy" in line["problem"]
    with pytest.raises(
        MigrationError, match="exist nowhere any more"
    ):  # the guest is not saved with holes
        xl.world.ask("receiver", command="await-memory", domid=xl.destination.domid)
    xl.world.check_alive()
    xl.destination.destroy()
    until(lambda: xl.line("receiver")["phase"] == "failed", "it is not noticed")
    if again == "sender":
        until(lambda: not owed(xl), "it is owed still")


def has_no_keeper(xl: CuttableXl, keeper: int) -> None:
    """Check that the keeper ends, and leaves nothing."""
    until(lambda: not lives(keeper), "the keeper lives")
    until(lambda: not sockets_of_keepers(xl.world), "the keeper's socket is left")
    assert not keepers(sender_of(xl))


@LARGE
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM])
def test_a_sender_that_dies_afterwards_has_a_successor_with_its_pages(
    xl: CuttableXl, sig: signal.Signals
) -> None:
    """After SIGTERM the sender waits until nothing is missing, and a second SIGTERM ends it."""
    keeper = keeper_of(xl.world)
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    if sig is signal.SIGTERM:
        xl.world.processes["sender"].popen.send_signal(sig)
        until(lambda: "waiting for guests elsewhere" in log_of(xl, "sender"), "it does not wait")
    xl.restart("sender", sig)
    assert lives(keeper)
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    has_no_keeper(xl, keeper)


@LARGE
def test_each_of_several_successors_has_the_pages(xl: CuttableXl) -> None:
    keeper = keeper_of(xl.world)
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    migration = xl.line("sender")["id"]
    xl.world.ask("sender", command="pause", migration=migration)
    for _ in range(3):
        xl.restart("sender")
        assert not keepers(sender_of(xl))
        xl.wait_for("postcopy", "postcopy")
    xl.world.ask("sender", command="resume", migration=migration)
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    has_no_keeper(xl, keeper)


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_xl_destroys_the_source_of_a_sender_that_was_killed(xl: CuttableXl, when: str) -> None:
    """The source is destroyed before the successor runs, or when the successor has opened it."""
    keeper = keeper_of(xl.world)
    port = xl.world.ask("sender", command="status")["port"]
    if when == "before":
        xl.go()
    xl.world.stop("sender", signal.SIGKILL)
    if when == "while":
        xl.go()
    start_sender(xl.world, port)
    if when == "after":
        xl.wait_for("deciding", "deciding")
        xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    has_no_keeper(xl, keeper)


def test_a_successor_without_a_keeper_holds_the_pages_and_has_a_keeper(xl: CuttableXl) -> None:
    """While xl decides, the domain still exists."""
    xl.lose_sender()
    xl.wait_for("deciding", "deciding")
    keeper = keeper_of(xl.world)
    port = xl.world.ask("sender", command="status")["port"]
    xl.world.stop("sender", signal.SIGKILL)
    xl.go()
    start_sender(xl.world, port)
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    has_no_keeper(xl, keeper)


def test_a_source_that_goes_before_its_pages_are_held_again_is_noticed(xl: CuttableXl) -> None:
    """The keeper was killed as well, and xl destroys the source before the receiver is back."""
    xl.relay.do(Link.down)
    xl.lose_sender()
    until(lambda: xl.line("sender")["phase"] == "interrupted", "it is not interrupted")
    xl.go()
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    until(lambda: xl.line("receiver")["phase"] == "lost", "the receiver does not show the loss")


def test_a_guest_that_lacks_nothing_needs_no_sender_when_its_source_is_gone(xl: CuttableXl) -> None:
    """The sender and its keeper are killed when all pages have arrived.  The receiver that has
    answered the sender is killed before xl lets the guest run.
    """
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    xl.relay.do(Link.down)
    xl.source.destroy()
    xl.lose_sender()
    until(lambda: xl.line("sender")["phase"] == "failed", "the sender does not show the failure")
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    until(lambda: not owed(xl), "the receiver is not informed")
    xl.restart("receiver")
    xl.destination.start()
    until(lambda: xl.line("receiver")["phase"] == "completed", "it is not completed")
    check_arrived(xl)


@pytest.mark.parametrize("killed", [False, True])
def test_the_keeper_ends_when_the_guest_stays(xl: CuttableXl, killed: bool) -> None:
    keeper = keeper_of(xl.world)
    if killed:
        xl.restart("sender")
        xl.wait_for("deciding", "deciding")
    xl.stay()
    xl.wait_for("failed", "failed")
    has_no_keeper(xl, keeper)
    check_stayed(xl)


def keeper_of_interrupted_successor(xl: CuttableXl) -> int:
    """Restart a sender whose pages are missing at the destination, and whose link is down.  Returns
    the process of its keeper.
    """
    keeper = keeper_of(xl.world)
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.relay.do(Link.down)
    xl.restart("sender")
    until(lambda: xl.line("sender")["phase"] == "interrupted", "it is not interrupted")
    return keeper


@LARGE
def test_the_keeper_ends_when_an_operator_releases_its_pages(xl: CuttableXl) -> None:
    keeper = keeper_of_interrupted_successor(xl)
    decide(xl, here=False, force=True)
    has_no_keeper(xl, keeper)
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    until(lambda: xl.line("sender")["phase"] == "failed", "it is not carried out")


@LARGE
def test_a_keeper_that_is_killed_is_replaced(xl: CuttableXl) -> None:
    killed: list[int] = []
    for _ in range(2):
        killed.append(keeper_of(xl.world))
        os.kill(killed[-1], signal.SIGKILL)
        until(lambda: keepers(sender_of(xl)) not in ([], killed[-1:]), "there is no other keeper")
    assert log_of(xl, "sender").count("was killed by signal 9: starting another one") == 2
    keeper = keeper_of(xl.world)
    xl.go()
    xl.wait_for("postcopy", "postcopy")
    xl.restart("sender")
    assert lives(keeper) and not keepers(sender_of(xl))
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    has_no_keeper(xl, keeper)


@LARGE
def test_a_keeper_that_is_killed_under_a_successor_takes_the_pages_with_it(xl: CuttableXl) -> None:
    keeper = keeper_of_interrupted_successor(xl)
    os.kill(keeper, signal.SIGKILL)
    xl.relay.do(lambda link: setattr(link, "is_up", True))
    until(lambda: xl.line("sender")["phase"] == "failed", "the sender does not show the failure")
    assert "the pages that it lacks at the destination are lost" in xl.line("sender")["problem"]
    until(lambda: xl.line("receiver")["phase"] == "lost", "the receiver does not show the loss")
    has_no_keeper(xl, keeper)


def test_a_keeper_that_no_migration_needs_is_ended(xl: CuttableXl) -> None:
    """The sender was killed between the end of the migration and the end of the keeper."""
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)
    other = xl.destination
    other.hold(pfns(3))
    other.keep(xl.world.directory / "source.sock.state/sender/0123.keeper")
    (keeper,) = keepers(os.getpid())
    xl.restart("sender")
    has_no_keeper(xl, keeper)
