# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon is killed, at any instant, and started again.  The guest runs in exactly one place and
loses nothing.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.cli.world import World, start_receiver, start_sender, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.lanes.dial import REJOINS_OF_ONE_LIFE
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import COMMAND_S, PROGRAM
from tests.support.daemons import journal, kill, last_entry, lines, note, phase, world
from tests.support.waiting import WAIT_S, until
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec

__all__ = ["world"]

ENDED = ("completed", "failed", "refused")


def spec() -> GuestSpec:
    return GuestSpec(
        "guest",
        32 * MIB,
        2,
        workload="random",
        working_set_bytes=16 * MIB,
        zero_permille=100,
        rate=5000,
    )


def start_anew(world: World, which: str) -> None:
    if which == "sender":
        start_sender(world)
    else:
        start_receiver(world, world.port)


def begin(world: World, strategy: str = "hybrid", bandwidth: float | None = 32 * MIB) -> None:
    """Begin a migration that does not end before the test has done its part."""
    guest = world.source.create_guest(spec().to_bytes())
    wait_for_steps(guest, 100)
    guest.close()
    client = world.control("sender")
    client.send(
        command="migrate", domain="guest", destination=f"127.0.0.1:{world.port}", strategy=strategy,
        bandwidth=bandwidth, policy={"max_rounds": 2},
    )  # fmt: skip
    client.answer()
    client.close()


def check(world: World) -> str:
    """Wait for the end of the migration, and verify the guest where it runs.  Returns the host."""

    def settled() -> bool:
        ends = {which: phase(world, which) for which in ("sender", "receiver")}
        return all(end in (*ENDED, "") for end in ends.values())

    try:
        until(settled, "it does not end")
    except AssertionError as error:
        told = {
            which: (lines(world, which), world.processes[which].tail())
            for which in ("sender", "receiver")
        }
        raise AssertionError(f"it does not end: {told}") from error
    places = [
        (which, info.state)
        for which, host in (("source", world.source), ("destination", world.destination))
        for info in host.domains()
    ]
    assert [state for _which, state in places] == [DomainState.RUNNING], places
    (where, _state) = places[0]
    if where == "destination":
        verification, _view = verify_migrated(world, spec())
        assert verification.problems == []
    else:
        domain = world.source.open("guest")
        wait_for_steps(domain, 100)
        report = domain.report()
        assert [vcpu["errors"] for vcpu in report["vcpu"]] == [0, 0]
        domain.close()
    return where


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_successor_shows_what_is_done_of_the_pages_missing_at_the_handover(
    world: World, which: str
) -> None:
    begin(world, "postcopy", MIB)
    until(lambda: phase(world, which) == "postcopy", "no postcopy")
    (before,) = lines(world, which)
    total = before["pages_total"]
    until(lambda: 0 < lines(world, which)[0]["outstanding"] < total, "no page arrives")
    kill(world, which)
    start_anew(world, which)
    until(lambda: lines(world, which)[0]["pages_done"], "nothing is shown as done")
    (after,) = lines(world, which)
    assert after["pages_total"] == total
    assert after["pages_done"] == total - after["outstanding"]
    world.ask("sender", command="set", migration="guest", values={"bandwidth_bytes_per_s": None})
    assert check(world) == "destination"


@pytest.mark.parametrize("which", ["sender", "receiver"])
@pytest.mark.parametrize("strategy", ["hybrid", "postcopy"])
def test_killed_in_postcopy_its_successor_continues(
    world: World, which: str, strategy: str
) -> None:
    begin(world, strategy)
    if strategy == "hybrid":  # by itself the policy would send the few pages before the handover
        until(lambda: phase(world, "sender") == "precopy", "no precopy")
        world.ask("sender", command="postcopy-now", migration="guest")
    for _ in range(3):
        # With so few pages left another postcopy may end before it is noticed.
        until(lambda: phase(world, "receiver") in ("postcopy", "completed"), "no postcopy")
        outstanding = lines(world, "receiver")[-1]["outstanding"]
        kill(world, which)
        other = "receiver" if which == "sender" else "sender"
        until(lambda: phase(world, other) in ("interrupted", "completed"), "it was not noticed")
        start_anew(world, which)
        if outstanding < 1000:
            break
    assert check(world) == "destination"


def test_what_a_successor_does_not_know_is_shown_as_unknown(world: World) -> None:
    """Before, a restarted sender showed 0 missing pages and 0 bytes of memory."""
    begin(world, "postcopy", bandwidth=2 * MIB)
    until(lambda: phase(world, "sender") == "postcopy", "no postcopy")
    for which in ("receiver", "sender"):
        kill(world, which)
    start_anew(world, "sender")
    (line,) = lines(world, "sender")
    assert line["outstanding"] == 0 and "outstanding" in line["unknown"]
    socket = ("--socket", str(world.sender_socket))
    titles, row = zygote.run([*PROGRAM, "list", *socket], timeout=WAIT_S).stdout.splitlines()
    assert row.split()[1:4] == ["guest", "outgoing", "interrupted"]
    assert row[: titles.index("OUTSTANDING") + len("OUTSTANDING")].split()[-1] == "-"
    shown = zygote.run([*PROGRAM, "show", "guest", *socket], timeout=WAIT_S).stdout
    values = {line[:22].rstrip(): line[23:] for line in shown.splitlines()}
    for key in ("outstanding", "memory", "downtime", "precopy"):
        assert values[key] == "-"
    assert "unknown" not in values
    start_anew(world, "receiver")
    until(lambda: lines(world, "sender")[-1]["outstanding"] > 0, "the sender does not learn it")
    (line,) = lines(world, "sender")
    assert "outstanding" not in line["unknown"] and "memory_bytes" in line["unknown"]


def test_each_successor_counts_its_attempts_from_another_number(world: World) -> None:
    """The receiver accepts a number once, and a clock may go back."""
    begin(world, "postcopy", bandwidth=2 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    numbers = []
    for _ in range(3):
        kill(world, "sender")
        until(lambda: phase(world, "receiver") == "interrupted", "it was not noticed")
        start_anew(world, "sender")
        until(lambda: phase(world, "receiver") == "postcopy", "the successor is not received")
        numbers.append(json.loads(journal(world, "sender").read_text().splitlines()[-1])["rejoins"])
    assert numbers == [REJOINS_OF_ONE_LIFE * life for life in (1, 2, 3)]


@pytest.mark.parametrize("noted", [True, False])
def test_a_limit_that_a_killed_receiver_has_raised_is_given_back_by_its_successor(
    world: World, noted: bool
) -> None:
    """``xl mem-set`` lowers the limit while pages are missing.  Earlier releases noted no limit."""
    begin(world, "postcopy", bandwidth=8 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    with world.destination.open("guest") as guest:
        lower = guest.nr_pfns - 4000  # the limit is lowered long before the last page has arrived
        guest.set_max_pages(lower)
        until(lambda: guest.reservation().max_pages > lower, "the limit is not raised")
        assert guest.reservation().paged_pages
        kill(world, "receiver")
        if not noted:
            path = journal(world, "receiver")
            last = last_entry(path)
            del last["raised"]
            path.write_text(json.dumps(last))
        start_anew(world, "receiver")
        assert check(world) == "destination"
        assert (guest.reservation().max_pages == lower) is noted


def test_both_killed(world: World) -> None:
    begin(world, "postcopy")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "sender")
    kill(world, "receiver")
    start_anew(world, "sender")
    start_anew(world, "receiver")
    assert check(world) == "destination"


def test_a_receiver_s_successor_counts_what_is_missing_without_a_sender(world: World) -> None:
    begin(world, "postcopy", bandwidth=8 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "sender")
    kill(world, "receiver")
    start_anew(world, "receiver")
    until(
        lambda: lines(world, "receiver")[-1]["waiting"] > 0, "no vCPU is shown to wait for a page"
    )
    (line,) = lines(world, "receiver")
    assert line["phase"] == "interrupted" and line["outstanding"] > 0
    start_anew(world, "sender")
    assert check(world) == "destination"


@pytest.mark.parametrize("wanted", ["precopy", "postcopy"])
def test_migrate_reports_what_is_known_when_the_sender_dies(
    world: World, tmp_path: Path, wanted: str
) -> None:
    guest = world.source.create_guest(spec().to_bytes())
    wait_for_steps(guest, 100)
    guest.close()
    written = tmp_path / "result.json"
    command = [
        *PROGRAM, "migrate", "guest", f"127.0.0.1:{world.port}", "--socket",
        str(world.sender_socket), "--bandwidth", "2M", "--strategy",
        "hybrid" if wanted == "precopy" else "postcopy", "--json", str(written),
    ]  # fmt: skip
    with zygote.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while f"guest: {wanted}" not in (line := process.stderr.readline()):
            assert line
        (before,) = lines(world, "sender")
        kill(world, "sender")
        _out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 3
    assert (
        f"last known phase is {wanted}" in err and f"xen-postcopy watch {before['id'][:8]}" in err
    )
    assert ("runs at the destination" in err) is (wanted == "postcopy")
    result = json.loads(written.read_text())
    assert (result["phase"], result["handed_over"], result["verified"]) == (
        wanted,
        wanted == "postcopy",
        None,
    )


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_killed_in_precopy_the_guest_stays(world: World, which: str) -> None:
    begin(world, bandwidth=4 * MIB)
    until(lambda: phase(world, "receiver") == phase(world, "sender") == "precopy", "no precopy")
    kill(world, which)
    start_anew(world, which)
    assert check(world) == "source"
    # the guest can be migrated afterwards
    with world.control("sender") as client:
        result = client.call(
            command="migrate", domain="guest", destination=f"127.0.0.1:{world.port}"
        )
    assert result["result"]["domain"] == "guest"


def test_the_last_entry_of_a_journal_was_not_written(world: World) -> None:
    """Found by chaos: all pages had arrived, and the successor treated the guest as one whose ring
    was lost.
    """
    begin(world, "postcopy", bandwidth=8 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    entries = list(world.directory.glob("destination.sock.state/receiver/*.json"))
    until(lambda: "taken over" in entries[0].read_text(), "it is not noted")
    taken_over = entries[0].read_text()
    until(lambda: phase(world, "receiver") == "completed", "it does not end")
    kill(world, "receiver")
    entries[0].write_text(taken_over)
    start_anew(world, "receiver")
    assert check(world) == "destination"


def test_the_guest_ends_while_its_pager_is_dead(world: World) -> None:
    begin(world, "postcopy", bandwidth=4 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "receiver")
    world.destination.open("guest").destroy()
    start_anew(world, "receiver")
    until(lambda: phase(world, "sender") == "failed", "the sender was not informed")
    assert "ended at the destination" in lines(world, "sender")[-1]["problem"]
    assert world.source.domains() == []


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_a_second_daemon_takes_up_nothing_of_one_that_runs(
    world: World, which: str, tmp_path: Path
) -> None:
    """If a daemon is started twice by mistake, the second one would treat the first one's
    migrations as those of a dead predecessor.
    """
    begin(world, bandwidth=4 * MIB)
    until(lambda: phase(world, "receiver") == phase(world, "sender") == "precopy", "no precopy")
    world.ask("sender", command="pause", migration="guest")
    host = world.directory / ("source.sock" if which == "sender" else "destination.sock")
    arguments = [
        which,
        "--listen",
        "127.0.0.1:0",
        "--socket",
        str(tmp_path / "second.sock"),
        "--simulated",
        str(host),
    ]
    second = subprocess.run(
        [sys.executable, "-m", "migrate.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert second.returncode == 1
    assert "another daemon" in second.stderr
    values = {"bandwidth_bytes_per_s": None}
    world.ask("sender", command="set", migration="guest", values=values)
    world.ask("sender", command="resume", migration="guest")
    assert check(world) == "destination"


def check_kept(world: World, which: str, session: str, domain: str, told: str) -> None:
    """An operator sees the entry of the journal that was not taken up, and what to do."""
    socket = ("--socket", str(world.directory / f"{which}.sock"))
    listed = zygote.run([*PROGRAM, "list", *socket], timeout=WAIT_S).stdout.splitlines()
    (row,) = [line for line in listed if line.startswith(f"{session[:8]} ")]
    direction = "outgoing" if which == "sender" else "incoming"
    assert row.split(maxsplit=5)[1:5] == [domain, direction, "-", "-"] and told in row
    found = json.loads(zygote.run([*PROGRAM, "list", "--json", *socket], timeout=WAIT_S).stdout)
    (kept,) = [line for line in found if line["id"] == session]
    assert kept["phase"] == "" and told in kept["problem"]
    assert all(line.keys() == kept.keys() for line in found)


def test_an_entry_that_cannot_be_used_is_listed_with_what_to_do(world: World) -> None:
    """And a request that names the entry is answered with the same."""
    for which, host in (("sender", "source"), ("receiver", "destination")):
        world.stop(which)
        state = world.directory / f"{host}.sock.state" / which
        (state / "0123456789abcdef.json").write_text("\nnothing of ours\n")
        start_anew(world, which)
        told = (
            "its last entry is damaged; if a guest of this host waits for this migration, start "
            "the release that wrote the file, otherwise remove the file"
        )
        check_kept(world, which, "0123456789abcdef", "-", told)
        with pytest.raises(MigrationError, match=told):
            world.ask(which, command="show", migration="01234567")


@pytest.mark.sweep
@pytest.mark.parametrize("older", ["!first", "~last"])
@pytest.mark.parametrize(
    ("which", "step"),
    [
        ("sender", "begun"), ("sender", "suspending"), ("sender", "given up"),
        ("receiver", "making"), ("receiver", "made"),
    ],
)  # fmt: skip
def test_of_two_entries_for_one_domain_the_newer_is_taken_up(
    world: World, which: str, step: str, older: str
) -> None:
    """The older entry is of a migration whose entry could not be erased."""
    begin(world, "postcopy", bandwidth=4 * MIB)
    until(lambda: phase(world, which) == "postcopy", "no postcopy")
    kill(world, which)
    newer = journal(world, which)
    facts = last_entry(newer)
    facts |= {"step": step, "key": "07" * 16, "domid": -1 if step == "making" else facts["domid"]}
    path = newer.with_name(f"{older}.json")  # by its name before the newer one, or after it
    path.write_text(f"\n{json.dumps(facts)}")
    os.utime(path, (newer.stat().st_mtime - 1,) * 2)
    start_anew(world, which)
    assert [line["id"] for line in lines(world, which) if line["id"] != path.stem] == [newer.stem]
    if step != "given up":
        assert path.exists()
        log = world.processes[which].log.read_text()
        assert f"{path}: kept and not resumed" in log
        told = f"{path}: kept and not resumed, because a newer journal"
        check_kept(world, which, path.stem, "guest", told)
        path.unlink()
        assert world.ask(which, command="list")["kept"] == []
    line = {"id": newer.stem, "phase": "completed"}.items()
    until(lambda: any(line <= found.items() for found in lines(world, which)), "it does not end")
    assert check(world) == "destination"


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_an_operator_s_decision_outlives_the_sender(world: World, here: bool, killed: bool) -> None:
    """The decision is in the journal before the operator is answered, and a successor carries it
    out.

    Found under load: the sender was killed after its answer, and the guest stayed suspended for
    ever.
    """
    begin(world, "postcopy", bandwidth=8 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "receiver")
    world.destination.open("guest").destroy()
    until(lambda: phase(world, "sender") == "interrupted", "it was not noticed")
    step = "decided here" if here else "decided elsewhere"
    if killed:
        kill(world, "sender")
        note(world, "sender", step)
        start_sender(world)
    else:
        kept = os.open(
            journal(world, "sender"), os.O_RDONLY
        )  # the file may have been removed by then
        world.ask("sender", command="decide", migration="guest", here=here, force=True)
        written = os.pread(kept, 2**20, 0).decode()
        os.close(kept)
        assert step in [json.loads(entry)["step"] for entry in written.splitlines() if entry]
    until(lambda: phase(world, "sender") == "failed", "the decision is not carried out")
    assert "an operator has decided" in lines(world, "sender")[-1]["problem"]
    assert [info.state for info in world.source.domains()] == (
        [DomainState.RUNNING] if here else []
    )


def test_a_guest_given_up_by_an_operator_is_destroyed_by_the_receiver_s_successor(
    world: World,
) -> None:
    begin(world, "postcopy", bandwidth=8 * MIB)
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    kill(world, "sender")
    kill(world, "receiver")
    note(world, "receiver", "decided elsewhere")
    start_anew(world, "receiver")
    until(lambda: phase(world, "receiver") == "failed", "the decision is not carried out")
    assert "an operator has decided" in lines(world, "receiver")[-1]["problem"]
    assert world.destination.domains() == []


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(16))
def test_killed_at_any_instant(world: World, seed: int) -> None:
    random_ = random.Random(seed)
    strategy, which = (
        random_.choice(["hybrid", "postcopy", "precopy"]),
        random_.choice(["sender", "receiver"]),
    )
    begin(world, strategy, bandwidth=random_.choice([None, 64 * MIB]))
    time.sleep(random_.uniform(0, 0.6))
    kill(world, which)
    time.sleep(random_.choice([0, 0.3]))
    start_anew(world, which)
    check(world)
