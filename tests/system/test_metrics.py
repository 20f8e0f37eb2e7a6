# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics of real daemons: scraped over HTTP, read as Prometheus reads them, and compared with what
``show`` answers.
"""

from __future__ import annotations

import functools
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrate.cli.world import World, loopback_world, start_receiver, start_sender, verify_migrated
from migrate.metrics.serve import MISSING
from migrate.metrics.table import PREFIX
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.daemons import begin, boot, kill, lines, phase
from tests.support.metrics import Samples, endpoint, exchange, samples, scrape, value
from tests.support.waiting import WAIT_S, until

BOTH = ("sender", "receiver")
CONFIG = """
[metrics]
sender_listen = "127.0.0.1:0"
receiver_listen = "127.0.0.2:0"
"""
MEASURED = pytest.mark.parametrize("world", [CONFIG], indirect=True)


def scraped(world: World, which: str) -> Samples:
    return samples(scrape(endpoint(world, which)))


def ended(world: World) -> None:
    """Wait until both ends have counted a migration that was completed."""
    for which in BOTH:
        until(
            lambda: value(scraped(world, which), "ended_migrations_total", outcome="completed") > 0,
            "it is not counted",
        )


@MEASURED
def test_a_scrape_has_the_figures_of_a_migration(world: World) -> None:
    spec = boot(world)
    begin(world, "guest")
    until(lambda: phase(world, "receiver") == "postcopy", "no postcopy")
    name = PREFIX + "migration_outstanding_pages"
    for which in BOTH:
        until(lambda: name in scraped(world, which), "no series")
        found = scraped(world, which)
        (line,) = lines(world, which)
        assert value(found, "migrations", phase="postcopy") == 1
        assert value(found, "migration_info", migration=line["id"], domain="guest") == 1
        assert value(found, "outstanding_pages") > 0
        assert value(found, "ended_migrations_total", outcome="completed") == 0
    ended(world)
    for which in BOTH:
        found, shown = scraped(world, which), world.ask(which, command="show", migration="guest")
        details = shown["details"]
        assert name not in found and value(found, "outstanding_pages") == 0
        if which == "sender":
            for lane in ("push", "pull"):
                sent = details["lanes"][f"{lane}_bytes"]
                assert value(found, "sent_bytes_total", lane=lane) == sent > 0
            pages = details["push"]["pages"]
            assert value(found, "sent_memory_bytes_total", reason="push") == pages * 4096
            assert value(found, "downtime_seconds_sum") == details["downtime_s"] > 0
        else:
            faults = details["fault_latency_us"]["count"]
            assert value(found, "fault_latency_seconds_count") == faults > 0
    assert details["fault_latency_us"] == world.ask("sender", command="show", migration="guest")[
        "details"]["fault_latency_us"]  # fmt: skip
    assert verify_migrated(world, spec)[0].problems == []


@MEASURED
def test_a_restarted_daemon_counts_from_the_beginning(world: World) -> None:
    boot(world)
    begin(world, "guest", bandwidth=2**30)
    ended(world)
    for which in BOTH:
        kill(world, which)
    start_receiver(world, world.port)
    start_sender(world)
    for which in BOTH:
        found = scraped(world, which)
        assert value(found, "ended_migrations_total", outcome="completed") == 0
        assert len(world.ask(which, command="list", all=True)["migrations"]) == 1


@MEASURED
def test_slow_and_many_clients_disturb_no_migration(world: World) -> None:
    """Some send nothing, some receive nothing, and one scrapes as fast as it can."""
    spec = boot(world)
    stopped, scrapes = threading.Event(), list[Samples]()

    def scrape_again_and_again() -> None:
        while not stopped.is_set():
            scrapes.append(scraped(world, "receiver"))

    addresses = [endpoint(world, which).split("/")[2].split(":") for which in BOTH]
    clients = [
        socket.create_connection((host, int(port)), WAIT_S)
        for host, port in addresses
        for _ in range(8)
    ]
    for client in clients[::2]:
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    busy = threading.Thread(target=scrape_again_and_again)
    busy.start()
    try:
        begin(world, "guest", bandwidth=16 * MIB)
        ended(world)
    finally:
        stopped.set()
        busy.join(WAIT_S)
        for client in clients:
            client.close()
    world.check_alive()
    assert verify_migrated(world, spec)[0].problems == []
    counts = [value(found, "fault_latency_seconds_count") for found in scrapes]
    assert len(counts) > 1 and counts == sorted(counts)


def is_renewed(file: Path, first: int) -> bool:
    """Whether the file is another one than that with the inode ``first``."""
    return file.stat().st_ino != first


def test_metrics_at_a_socket_and_in_files(tmp_path: Path) -> None:
    config = f"""
        [metrics]
        sender_listen = "{tmp_path}/sender.metrics"
        textfiles = "{tmp_path}"
        textfile_every_s = 0.1
    """
    with loopback_world(64 * MIB, config=config) as world:
        path = tmp_path / "sender.metrics"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        answer = exchange(path, b"GET /metrics HTTP/1.1\r\nAccept: text/plain\r\n\r\n")
        assert b" 200 " in answer and b'xen_postcopy_daemon_info{end="sender"' in answer
        for which in BOTH:
            file = tmp_path / f"xen-postcopy-{which}.prom"
            until(file.exists, "no file")
            until(functools.partial(is_renewed, file, file.stat().st_ino), "it is not renewed")
            assert PREFIX + "outstanding_pages" in {
                family.name for family in text_string_to_metric_families(file.read_text())
            }
            world.stop(which)
            assert not file.exists()
        assert not path.exists()


def test_a_second_daemon_leaves_the_file_of_the_first(tmp_path: Path) -> None:
    config = f'[metrics]\ntextfiles = "{tmp_path}"\ntextfile_every_s = 3600\n'
    with loopback_world(64 * MIB, config=config) as world:
        for which, host in (("sender", "source"), ("receiver", "destination")):
            file = tmp_path / f"xen-postcopy-{which}.prom"
            until(file.exists, "no file")
            before = file.stat()
            command = [
                *PROGRAM, which, "--config", str(world.config_file), "--listen", "127.0.0.1:0",
                "--socket", str(tmp_path / "s"), "--simulated",
                str(world.directory / f"{host}.sock"),
            ]  # fmt: skip
            ended = zygote.run(command, timeout=WAIT_S)
            assert ended.returncode == 1 and "another daemon uses it" in ended.stderr
            assert file.stat() == before


def test_a_daemon_that_cannot_listen_does_not_start(tmp_path: Path) -> None:
    with loopback_world(64 * MIB, daemons=False) as world, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        for which, host in (("sender", "source"), ("receiver", "destination")):
            config = tmp_path / "config.toml"
            config.write_text(f'[metrics]\n{which}_listen = "{at}"\n')
            command = [
                *PROGRAM, which, "--config", str(config), "--listen", "127.0.0.1:0",
                "--socket", str(tmp_path / "s"), "--state", str(tmp_path / "state"),
                "--simulated", str(world.directory / f"{host}.sock"),
            ]  # fmt: skip
            ended = zygote.run(command, timeout=WAIT_S)
            assert ended.returncode == 1
            assert ended.stderr.splitlines()[-1].startswith(
                f"xen-postcopy: [metrics] {which}_listen: cannot listen at {at}: "
            )
            without = "import sys; sys.modules['prometheus_client'] = None; " \
                "from migrate.cli import main; main()"  # fmt: skip
            missing = subprocess.run(
                [sys.executable, "-c", without, *command[len(PROGRAM) :]],
                capture_output=True, text=True, timeout=WAIT_S, check=False,
            )  # fmt: skip
            assert missing.returncode == 1 and MISSING in missing.stderr


@pytest.mark.parametrize("which", BOTH)
def test_metrics_at_an_address_of_the_daemon_itself_are_refused(tmp_path: Path, which: str) -> None:
    config, at = tmp_path / "config.toml", tmp_path / "s"
    for where, text in (
        (str(at), f"{at} is the control socket of the {which} (--socket)"),
        ("127.0.0.1:9999", f"127.0.0.1:9999 is the address of the {which} itself (--listen"),
    ):
        config.write_text(f'[metrics]\n{which}_listen = "{where}"\n')
        command = [
            *PROGRAM, which, "--config", str(config), "--listen", "127.0.0.1:9999",
            "--socket", str(at), "--simulated", str(tmp_path / "host"),
        ]  # fmt: skip
        ended = zygote.run(command, timeout=WAIT_S)
        assert ended.returncode == 1
        assert f"[metrics] {which}_listen: {text}" in ended.stderr


def test_scrapes_import_nothing_during_a_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import would add to the downtime or to a fault."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    with loopback_world(64 * MIB, config=CONFIG) as world:
        logs = [world.directory / f"{which}.log" for which in BOTH]
        before = [log.read_text() for log in logs]
        assert all("prometheus_client" in text for text in before)
        for which in BOTH:
            scraped(world, which)
            scrape(endpoint(world, which), "text/plain")
        for log, text in zip(logs, before, strict=True):
            assert "import time:" not in log.read_text().removeprefix(text)
