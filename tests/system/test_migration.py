# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations from end to end: four processes, real sockets, a guest that really runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from sender.switchover import HOT_PAGES
from tests.conftest import MIB
from tests.support.daemons import listed
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import WORKLOADS, GuestSpec

STRATEGIES = ["hybrid", "postcopy", "precopy"]


@pytest.fixture
def client(world: World) -> Iterator[ControlClient]:
    with world.control() as client:
        yield client


def boot(world: World, name: str, memory: int = 16 * MIB, **options: Any) -> GuestSpec:
    spec = GuestSpec(name, memory, **options)
    domain = world.source.create_guest(spec.to_bytes())
    wait_for_steps(domain, 5 if spec.workload == "idle" else 200)
    domain.close()
    return spec


def migrate(world: World, name: str, **request: Any) -> dict[str, Any]:
    answer = world.ask(
        "sender", command="migrate", domain=name, destination=f"127.0.0.1:{world.port}", **request
    )
    result: dict[str, Any] = answer["result"]
    return result


def check(world: World, spec: GuestSpec) -> dict[str, Any]:
    verification, view = verify_migrated(world, spec)
    assert verification.problems == []
    return view


@pytest.mark.sweep
@pytest.mark.parametrize("workload", list(WORKLOADS))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_with_every_workload(
    world: World, name: str, strategy: str, workload: str
) -> None:
    spec = boot(world, name, vcpus=2, workload=workload)
    result = migrate(world, name, strategy=strategy)
    check(world, spec)
    assert result["strategy"] == strategy
    assert result["memory_bytes"] == spec.memory_bytes
    assert 0 < result["downtime_s"] < result["total_s"]
    missing = result["switchover"]["missing_pages"]
    if strategy == "precopy":
        assert missing == result["pull"]["pages"] == 0
        assert result["precopy"]["pages"] >= spec.nr_pfns
    if strategy == "postcopy":
        assert result["precopy"]["pages"] == 0
        # All pages except the pinned set, and except those that are written all the time.
        assert spec.nr_pfns - spec.vcpus - HOT_PAGES <= missing <= spec.nr_pfns - spec.vcpus
    assert result["pull"]["pages"] <= missing <= result["push"]["pages"] + result["pull"]["pages"]
    assert result["fault_latency_us"]["count"] >= result["pull"]["requests"]
    assert result["populate_evicted"] == ("" if strategy == "precopy" else "native")


@pytest.mark.serial
@pytest.mark.parametrize("vcpus", [1, 9, 64])
def test_any_number_of_vcpus(world: World, name: str, vcpus: int) -> None:
    """This includes more vCPUs than the ring has slots."""
    spec = boot(world, name, vcpus=vcpus, write_permille=500)
    # The bandwidth is so low that the vCPUs touch absent pages.  Otherwise a busy machine would
    # push all pages before the first vCPU runs.
    result = migrate(world, name, strategy="postcopy", bandwidth=10 * MIB)
    view = check(world, spec)
    assert view["faults"] > 0
    assert sum(result["vcpu_block_s"].values()) > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_guest_that_gives_memory_away_meanwhile(world: World, name: str, strategy: str) -> None:
    spec = boot(
        world, name, vcpus=2, working_set_bytes=4 * MIB, balloon_pages=2500, balloon_every=50
    )
    migrate(world, name, strategy=strategy, bandwidth=50 * MIB)
    check(world, spec)


def test_any_file_as_memory(world: World, name: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(
        Path("/usr/bin/python3").resolve().read_bytes()[: 2 * MIB].ljust(2 * MIB, b"x")
    )
    spec = boot(world, name, memory=8 * MIB, image=str(image), working_set_bytes=1 * MIB)
    result = migrate(world, name)
    check(world, spec)
    assert result["zero_pages"] > 0


def test_zero_pages_are_sent_as_such(world: World, name: str) -> None:
    spec = boot(world, name, workload="idle", working_set_bytes=MIB, zero_permille=1000)
    result = migrate(world, name)
    check(world, spec)
    assert result["zero_pages"] > spec.nr_pfns * 0.9
    assert result["bytes_sent"] < spec.memory_bytes / 10


@pytest.mark.serial
def test_faults_are_not_held_back_by_the_bandwidth_cap(world: World, name: str) -> None:
    spec = boot(world, name, memory=8 * MIB, vcpus=2, zero_permille=0, working_set_bytes=8 * MIB)
    result = migrate(world, name, strategy="postcopy", bandwidth=2 * MIB)
    check(world, spec)
    assert result["pull"]["pages"] > result["push"]["pages"] / 4


def test_precopy_keeps_to_the_cap(world: World, name: str) -> None:
    boot(world, name, workload="idle", zero_permille=0)
    result = migrate(world, name, strategy="precopy", bandwidth=40 * MIB)
    assert result["total_s"] > 16 / 40 * 0.8  # 16 MiB at 40 MiB/s, less the burst


@pytest.mark.serial
def test_many_at_once_through_one_pair_of_daemons(world: World, name: str) -> None:
    specs = [boot(world, f"{name}-{i}", memory=8 * MIB, seed=i) for i in range(8)]
    results: dict[int, Any] = {}

    def one(i: int) -> None:
        results[i] = migrate(world, specs[i].name, strategy=STRATEGIES[i % 3])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == list(range(len(specs)))
    for spec in specs:
        check(world, spec)


@pytest.mark.parametrize("hole", [0, 256 * MIB], ids=["", "with a hole"])
def test_there_and_back_again(name: str, hole: int) -> None:
    """The second migration starts from a guest that was itself restored by postcopy."""
    with loopback_world(64 * MIB) as there:
        spec = boot(there, name, vcpus=2, mmio_hole_bytes=hole)
        migrate(there, name, strategy="postcopy")
        domain = there.destination.open(name)
        wait_for_steps(domain, 200)
        domain.close()
        there.start(
            "back-receiver", "receiver", "--listen", "127.0.0.1:0", "--socket",
            str(there.directory / "back-receiver.sock"), "--simulated",
            str(there.directory / "source.sock"),
        )  # fmt: skip
        there.start(
            "back-sender", "sender", "--listen", "127.0.0.1:0", "--socket",
            str(there.directory / "back-sender.sock"), "--simulated",
            str(there.directory / "destination.sock"),
        )  # fmt: skip
        port = there.ask("back-receiver", command="status")["port"]
        there.ask("back-sender", command="migrate", domain=name, destination=f"127.0.0.1:{port}")
        there.source, there.destination = there.destination, there.source
        check(there, spec)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_on_both_sides_of_a_hole_for_devices(world: World, name: str, strategy: str) -> None:
    """Nothing is sent for the pfns of the hole, which are 64 times as many as the pages."""
    spec = boot(world, name, vcpus=2, working_set_bytes=12 * MIB, mmio_hole_bytes=1024 * MIB)
    result = migrate(world, name, strategy=strategy)
    check(world, spec)
    sent = result["precopy"]["pages"] + result["switchover"]["pages"] + result["push"]["pages"]
    assert spec.pages <= sent + result["pull"]["pages"]
    if strategy == "postcopy":
        assert result["switchover"]["missing_pages"] <= spec.pages
        assert result["bytes_sent"] < 2 * spec.memory_bytes


def test_a_hypervisor_without_the_batched_op_is_served_by_the_fallback(name: str) -> None:
    with loopback_world(64 * MIB, host_options=("--no-populate-evicted",)) as world:
        spec = boot(world, name, memory=4 * MIB)
        result = migrate(world, name, strategy="postcopy")
        check(world, spec)
        assert result["populate_evicted"] == "fallback"


def test_a_hypervisor_without_paging_takes_precopy_only(name: str) -> None:
    with loopback_world(64 * MIB, host_options=("--no-paging",)) as world:
        spec = boot(world, name, memory=4 * MIB)
        with pytest.raises(MigrationError, match="without memory paging"):
            migrate(world, name)
        assert world.destination.domains() == []
        migrate(world, name, strategy="precopy")
        check(world, spec)


@pytest.mark.parametrize("by_the_same_client", [True, False])
def test_postcopy_starts_when_somebody_says_so(
    world: World, client: ControlClient, name: str, by_the_same_client: bool
) -> None:
    spec = boot(world, name, zero_permille=0, workload="idle")
    client.send(
        command="migrate", domain=name, destination=f"127.0.0.1:{world.port}", bandwidth=4 * MIB
    )
    for answer in client.answers():
        if answer["event"] == "progress" and answer["phase"] == "precopy" and answer["pages_done"]:
            if by_the_same_client:
                client.send(command="postcopy-now")
            else:
                world.ask("sender", command="postcopy-now", migration=name)
            break
    (*_rest, last) = client.answers()
    assert last["result"]["switchover"]["missing_pages"] > spec.nr_pfns / 4
    check(world, spec)


def test_list_shows_what_became_of_migrations(world: World, name: str) -> None:
    boot(world, name, memory=4 * MIB)
    migrate(world, name)
    for which in ("sender", "receiver"):
        (line,) = listed(world, which, name)
        assert line["phase"] == "completed"


def test_a_cancelled_migration_leaves_no_trace(
    world: World, client: ControlClient, name: str
) -> None:
    boot(world, name, workload="idle", zero_permille=0)
    client.send(
        command="migrate", domain=name, destination=f"127.0.0.1:{world.port}", bandwidth=4 * MIB
    )
    for answer in client.answers():
        if answer["event"] == "progress" and answer["phase"] == "precopy":
            break
    world.ask("sender", command="cancel", migration=name)
    with pytest.raises(MigrationError, match="cancelled"):
        list(client.answers())
    assert world.source.open(name).info().state is DomainState.RUNNING
    migrate(world, name)  # the migration can be tried again at once
    assert [info.name for info in world.destination.domains()].count(name) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_imported_during_a_migration(
    monkeypatch: pytest.MonkeyPatch, name: str, strategy: str
) -> None:
    """An import would add to the downtime or to a fault; one took 9 ms."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with loopback_world(64 * MIB) as world:
        logs = [world.directory / f"{daemon}.log" for daemon in ("sender", "receiver")]
        at_start = [log.read_text() for log in logs]
        assert all("import time:" in text for text in at_start)
        boot(world, name, 32 * MIB, vcpus=2, workload="stride")
        migrate(world, name, strategy=strategy)
        for log, before in zip(logs, at_start, strict=True):
            assert "import time:" not in log.read_text().removeprefix(before)


def test_two_migrations_of_one_guest_do_not_meet(
    world: World, client: ControlClient, name: str
) -> None:
    boot(world, name, workload="idle", zero_permille=0)
    client.send(
        command="migrate", domain=name, destination=f"127.0.0.1:{world.port}", bandwidth=8 * MIB
    )
    assert next(client.answers())["event"] == "progress"
    with pytest.raises(MigrationError, match="already"):
        migrate(world, name)
    *_rest, last = client.answers()
    assert last["event"] == "result"
