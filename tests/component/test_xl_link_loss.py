# SPDX-License-Identifier: GPL-2.0-or-later
"""Under xl the link is lost, or a daemon is killed, while xl decides or later.  The guest is
unharmed at the end at which xl has put it.  A killed sender has a successor, because a
keeper has its pages.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from migrate.cli.figures import problem
from migrate.cli.world import loopback_world, start_receiver, start_sender, wait_for_steps
from migrate.errors import MigrationError
from migrate.service.history import RECORDS
from migrate.service.journal import HISTORY
from receiver.toolstack import GRANT_RETRY_S
from tests.conftest import MIB
from tests.support.keepers import keeper_of, keepers, lives, sockets_of_keepers
from tests.support.labs import until
from tests.support.links import Link, LinkInThread
from tests.support.pages import pfns
from tests.support.waiting import WAIT_S
from tests.support.xl import Xl, check_arrived, check_stayed
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec

SLOW_PUSH_S = 3 * WAIT_S
"""The limit for pages that are pushed a fifth of the time (sender/pace.py)."""


class CuttableXl(Xl):
    relay: LinkInThread

    def restart(self, which: str, sig: int = signal.SIGKILL) -> None:
        port = self.world.ask("sender", command="status")["port"]
        self.world.stop(which, sig)
        if which == "sender":
            start_sender(self.world, port)
        else:
            start_receiver(self.world, self.world.port)

    def lose_sender(self) -> None:
        """Kill the sender and the keeper of its pages; start a successor."""
        keeper = keeper_of(self.world)
        port = self.world.ask("sender", command="status")["port"]
        self.world.stop("sender", signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not lives(keeper), "the keeper lives")
        start_sender(self.world, port)


LARGE = pytest.mark.parametrize("xl", [64], indirect=True, ids=["64 MiB"])
"""For tests of a guest whose pages must not all arrive while xl decides, on the slowest machine."""


@pytest.fixture
def xl(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CuttableXl]:
    """An xl whose sender is reached over a link that can be cut.  The parameter is the size of the
    guest, in MiB.
    """
    memory = getattr(request, "param", 16) * MIB
    spec = GuestSpec("guest", memory, vcpus=2, workload="random", rate=5000)
    with LinkInThread(("127.0.0.1", 1)) as relay:
        config = f'[sender]\naddress = "127.0.0.1:{relay.link.port}"\n'
        config += '[migration]\nstrategy = "postcopy"\nbandwidth = "16M"\n'
        with loopback_world(256 * MIB, config=config) as world:
            relay.link.to = ("127.0.0.1", world.ask("sender", command="status")["port"])
            domain = world.source.create_guest(spec.to_bytes())
            wait_for_steps(domain, 200)
            domain.close()
            with contextlib.closing(CuttableXl(world, spec, tmp_path)) as made:
                made.relay = relay
                assert made.run() == ((0, 0), (0, 0))
                made.wait_for("deciding", "deciding")
                yield made


def some_have_come(xl: CuttableXl) -> None:
    """Wait until a part of the missing pages has been pushed, while xl decides."""
    total = xl.line("sender")["pages_total"]
    until(lambda: xl.line("sender")["outstanding"] < total, "nothing is pushed")
    assert xl.line("sender")["phase"] == "deciding"


def test_the_memory_arrives_while_xl_decides(xl: CuttableXl) -> None:
    """xl's hotplug scripts take half a minute."""
    until(lambda: not len(xl.destination.paged_out()), "the pages do not come", SLOW_PUSH_S)
    xl.wait_for("deciding", "deciding")
    until(lambda: not xl.line("sender")["outstanding"], "they are not confirmed")
    assert xl.destination.info().state is DomainState.INCOMING
    xl.go()
    xl.wait_for("completed", "completed")
    check_arrived(xl)


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
    assert "pages that exist nowhere any more: destroy it (xl destroy" in line["problem"]
    with pytest.raises(
        MigrationError, match="exist nowhere any more"
    ):  # the guest is not saved with holes
        xl.world.ask("receiver", command="await-memory", domid=xl.destination.domid)
    xl.world.check_alive()
    xl.destination.destroy()
    until(lambda: xl.line("receiver")["phase"] == "failed", "it is not noticed")
    if again == "sender":
        until(lambda: not owed(xl), "it is owed still")


def owed(xl: Xl) -> list[str]:
    """Return the names of the files that a sender has for what it must still do."""
    state = xl.world.directory / "source.sock.state/sender"
    return [path.name for path in state.iterdir() if path.name not in (HISTORY, RECORDS)]


def decide(xl: CuttableXl, *, here: bool, force: bool) -> None:
    """Decide at the sender, whose successor may be resuming the migration."""

    def is_decided() -> bool:
        try:
            xl.world.ask("sender", command="decide", migration=xl.spec.name, here=here, force=force)
        except MigrationError as error:
            if "ask again in a moment" not in str(error):
                raise
            return False
        return True

    until(is_decided, "the migration is not resumed", WAIT_S)


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


# ---- the keeper of the pages ----
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


def test_each_of_several_successors_has_the_pages(xl: CuttableXl) -> None:
    keeper = keeper_of(xl.world)
    xl.go()
    for _ in range(3):
        until(lambda: xl.line("receiver")["phase"] in ("postcopy", "completed"), "no postcopy")
        xl.restart("sender")
        assert not keepers(sender_of(xl))
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


def sender_of(xl: CuttableXl) -> int:
    return xl.world.processes["sender"].popen.pid


def log_of(xl: CuttableXl, which: str) -> str:
    return xl.world.processes[which].log.read_text()
