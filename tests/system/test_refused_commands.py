# SPDX-License-Identifier: GPL-2.0-or-later
"""A command that cannot be carried out is refused with one line, and the guest stays unharmed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.cli.world import World
from migrate.protocol import frames
from migrate.protocol import messages as m
from tests.conftest import MIB
from tests.support.command_line import assert_refused, assert_unharmed, boot, migrate, run
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec


# ---- migrate ----
def test_an_unknown_domain(world: World) -> None:
    assert_refused(migrate(world, "nobody"), "no such domain")


def test_no_sender_daemon(tmp_path: Path) -> None:
    assert_refused(
        run("migrate", "guest", "there", "--socket", tmp_path / "none.sock"),
        "is the daemon running?",
    )


def test_an_unreachable_destination(world: World, name: str) -> None:
    spec = boot(world, name)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert_refused(
        migrate(world, name, to=f"127.0.0.1:{port}"),
        "Connection refused; see whether xen-postcopy runs there",
    )
    assert_refused(migrate(world, name, to="127.0.0.1:http"), "HOST:PORT", status=2)
    assert_unharmed(world, spec)


@contextlib.contextmanager
def server(answer: bytes, *, hang_up: bool = False) -> Iterator[int]:
    """Run a server of another program.  It sends ``answer``, and then waits for the client to
    leave, or leaves when the client has sent something.
    """

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _address = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(answer)
                    while connection.recv(65536) and not hang_up:
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_destination_that_answers_garbage(world: World, name: str) -> None:
    spec = boot(world, name)
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert_refused(
            migrate(world, name, to=f"127.0.0.1:{port}"), "see whether that is the right port"
        )
    assert_unharmed(world, spec)


def test_a_destination_of_another_version(world: World, name: str) -> None:
    spec = boot(world, name)
    newer = m.Hello(7, 9, "push", "s", b"", (), (), "newer")
    with server(frames.encode(newer.header())) as port:
        assert_refused(migrate(world, name, to=f"127.0.0.1:{port}"), "versions 7 to 9")
    assert_unharmed(world, spec)


def test_a_destination_that_hangs_up(world: World, name: str) -> None:
    spec = boot(world, name)
    greeting = frames.encode(m.Hello(1, 1, "push", "s", b"", (), (), "x").header())
    with server(greeting + b"XPC1\0\0", hang_up=True) as port:
        assert_refused(migrate(world, name, to=f"127.0.0.1:{port}"), "connection")
    assert_unharmed(world, spec)


def test_a_name_in_use_at_the_destination(world: World, name: str) -> None:
    spec = boot(world, name)
    other = world.destination.create_guest(spec.to_bytes())
    assert_refused(migrate(world, name), "is there already: rename or destroy it first")
    assert other.info().state is DomainState.RUNNING
    other.destroy()
    other.close()
    assert_unharmed(world, spec)


def test_not_enough_memory_at_the_destination_is_known_before_anything_is_sent(
    world: World, name: str
) -> None:
    spec = boot(world, name, memory=1024 * MIB, workload="idle", zero_permille=1000)
    hog = world.destination.create_guest(
        GuestSpec(name + "-hog", 1536 * MIB, workload="idle", zero_permille=1000).to_bytes()
    )
    result = migrate(world, name)
    assert_refused(result, "not enough memory")
    assert "precopy" not in result.stderr
    hog.destroy()
    hog.close()
    assert_unharmed(world, spec)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--max-rounds", "0"], "--max-rounds"),
        (["--downtime-target", "0"], "--downtime-target"),
        (["--dirty-threshold", "-1"], "--dirty-threshold"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--bandwidth", "fast"], "is not a size"),
        (["--strategy", "teleport"], "teleport"),
        (["--checkpoint-every", "0.5"], "--checkpoint-every 0.5: only with --protect"),
        (
            ["--strategy", "precopy", "--postcopy-bandwidth", "1M"],
            "--postcopy-bandwidth: not with --strategy precopy",
        ),
        (
            ["--strategy", "postcopy", "--max-rounds", "5"],
            "--max-rounds: not with --strategy postcopy",
        ),
    ],
)
def test_senseless_migration_options(options: list[str], what: str) -> None:
    assert_refused(run("migrate", "guest", "there", *options), what, status=2)


def test_port_0_is_not_dialled() -> None:
    assert_refused(run("migrate", "guest", "there:0"), "'there:0': a port that is", status=2)


# ---- other commands ----
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--rate", "0"], "rate of 0"),
        (["--vcpus", "0"], "0 vCPUs"),
        (["--vcpus", "65"], "1 to 64"),
        (["--memory", "1M", "--working-set", "2M"], "above the memory"),
        (["--memory", "1000000"], "not a multiple of 4096"),
        (["--memory", "0"], "256 KiB"),
        (["--stride", "0", "--workload", "stride"], "stride"),
        (["--stride", "5"], "--stride 5: only with --workload stride"),
        (["--image", "i", "--zero-share", "0.5"], "--zero-share 0.5: not with --image"),
        (["--memory", "4M", "--balloon", "3M"], "balloon"),
        (["--image", "/nonexistent"], "No such file"),
        (["--image", __file__], "multiple of 4096"),
    ],
)
def test_senseless_guests(options: list[str], what: str) -> None:
    assert_refused(run("loopback", *options), what, status=2)


def test_an_image_larger_than_the_memory(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * MIB))
    assert_refused(
        run("loopback", "--image", image, "--memory", "4M"),
        "more than the guest's memory",
        status=2,
    )


def test_daemons_refuse_a_place_that_is_taken(world: World, tmp_path: Path) -> None:
    host, free = world.directory / "source.sock", tmp_path / "free.sock"
    assert_refused(run("simulated-host", "--socket", host), "another process listens there")
    any_port: list[str | Path] = ["sender", "--simulated", host, "--listen", "127.0.0.1:0"]
    assert_refused(
        run(*any_port, "--socket", world.sender_socket, "--state", tmp_path / "state"),
        "another process listens there",
    )
    assert_refused(run(*any_port, "--socket", free), "another daemon uses it")
    taken_port: list[str | Path] = [
        "receiver",
        "--simulated",
        host,
        "--listen",
        f"127.0.0.1:{world.port}",
    ]
    assert_refused(
        run(*taken_port, "--socket", free, "--state", tmp_path / "state"),
        "Address already in use; choose another address",
    )


def test_preflight_without_a_xen() -> None:
    assert_refused(run("preflight"), "--simulated SOCKET")


@pytest.mark.parametrize("command", ["preflight", "dry run", "estimate", "evacuate"])
def test_a_sender_is_not_asked_as_a_receiver(world: World, name: str, command: str) -> None:
    spec = boot(world, name)
    at = f"127.0.0.1:{world.ask('sender', command='status')['port']}"
    socket_option = ("--socket", world.sender_socket)
    refused = run(
        *{
            "preflight": ("preflight", "--peer", at, "--config", world.config_file),
            "dry run": ("migrate", name, at, "--dry-run", *socket_option),
            "estimate": ("estimate", name, at, "--seconds", "0.1", *socket_option),
            "evacuate": ("evacuate", at, "--seconds", "0.1", *socket_option),
        }[command]
    )  # fmt: skip
    assert_refused(refused, "this is a sender, and no receiver; receivers listen on port 8013")
    assert_unharmed(world, spec)


def test_the_port_of_a_sender_is_understood_as_one(world: World, name: str) -> None:
    spec = boot(world, name)
    port = world.ask("sender", command="status")["port"]
    refused = migrate(world, name, to=f"127.0.0.1:{port}")
    assert_refused(refused, "this is a sender, which has no such session; receivers listen on port")
    assert_unharmed(world, spec)
