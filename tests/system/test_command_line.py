# SPDX-License-Identifier: GPL-2.0-or-later
"""The program as a user runs it: its output, its exit status, and that a mistake loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.world import World, loopback_world, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.protocol import frames
from migrate.protocol import messages as m
from migrate.protocol.pfns import pfn_array
from tests.conftest import MIB
from tests.support import zygote
from tests.support.commands import PROGRAM
from tests.support.waiting import WAIT_S, until
from xenbackend.contract import DomainState
from xenbackend.simulated.guest import GuestSpec


def run(*arguments: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return zygote.run([*PROGRAM, *map(str, arguments)], timeout=timeout_s)


def boot(world: World, name: str, memory: int = 4 * MIB, **options: Any) -> GuestSpec:
    spec = GuestSpec(name, memory, **options)
    domain = world.source.create_guest(spec.to_bytes())
    wait_for_steps(domain, 5)
    domain.close()
    return spec


def request(world: World, name: str, *options: str, to: str | None = None) -> list[str]:
    """Return the arguments of a migration."""
    return [
        "migrate",
        name,
        to or f"127.0.0.1:{world.port}",
        "--socket",
        str(world.sender_socket),
        *options,
    ]


def migrate(
    world: World, name: str, *options: str, to: str | None = None
) -> subprocess.CompletedProcess[str]:
    return run(*request(world, name, *options, to=to))


def assert_refused(result: subprocess.CompletedProcess[str], what: str, status: int = 1) -> None:
    """Check that one line on standard error has what is wrong, and that the status is not 0."""
    assert result.returncode == status, result.stderr
    # guest: the progress of a migration, which on a busy machine takes long enough to be printed.
    # xencall: what Xen's library writes by itself, where it is installed and Xen does not run.
    others = ("guest-", "guest: ", "Usage:", "Try ", "xencall: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert len([line for line in lines if line.strip()]) == 1, result.stderr
    assert what in lines[-1]
    assert "Traceback" not in result.stderr


def assert_unharmed(world: World, spec: GuestSpec) -> None:
    """Check that the guest runs at the source, undamaged, and that the destination is empty."""
    from xenbackend.simulated.verify import verify

    deadline = time.monotonic() + WAIT_S
    while world.destination.domains():
        assert time.monotonic() < deadline, "left over at the destination"
        time.sleep(0.01)
    domain = world.source.open(spec.name)
    assert domain.info().state is DomainState.RUNNING
    wait_for_steps(domain, 5)
    domain.suspend()
    assert verify(domain, spec).problems == []
    domain.close()


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
    ],
)
def test_senseless_migration_options(options: list[str], what: str) -> None:
    assert_refused(run("migrate", "guest", "there", *options), what, status=2)


@pytest.mark.parametrize(
    "command", [("migrate", "guest", "there"), ("loopback", "--memory", "4M")], ids=lambda c: c[0]
)
def test_a_result_that_could_not_be_written_is_refused_before_the_migration(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    missing = tmp_path / "none" / "result.json"
    result = run(*command, "--json", missing)
    assert_refused(result, "cannot be written: No such file or directory", status=2)
    assert result.stdout == ""
    assert_refused(run(*command, "--json", tmp_path), "is a directory", status=2)


def test_a_result_that_is_not_written_does_not_hide_the_migration(world: World, name: str) -> None:
    spec = boot(world, name)
    result = migrate(world, name, "--json", "/dev/full")
    assert_refused(
        result,
        "the migration is completed, but its result cannot be written to /dev/full: No space",
    )
    assert f"{name} migrated" in result.stdout
    assert verify_migrated(world, spec)[0].problems == []


def test_a_result_that_is_not_written_does_not_hide_the_verification() -> None:
    result = run("loopback", "--memory", "4M", "--json", "/dev/full")
    assert_refused(result, "cannot be written to /dev/full")
    assert "verified: all 1024 pages" in result.stdout


# ---- loopback and guests ----
@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--rate", "0"], "rate of 0"),
        (["--vcpus", "0"], "0 vCPUs"),
        (["--vcpus", "65"], "1 to 64"),
        (["--memory", "1M", "--working-set", "2M"], "above the memory"),
        (["--memory", "1000000"], "not a multiple of 4096"),
        (["--memory", "0"], "256 KiB"),
        (["--stride", "0"], "stride"),
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


def test_loopback_reports_and_writes_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run("loopback", "--memory", "8M", "--vcpus", "2", "--json", path)
    assert result.returncode == 0, result.stderr
    assert "verified: all 2048 pages" in result.stdout
    data = json.loads(path.read_text())
    missing = data["switchover"]["missing_pages"]  # a short freeze needs none
    assert ("after the handover: " in result.stdout) == bool(missing)
    documented = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    for key in (
        "verified", "strategy", "memory_bytes", "total_s", "downtime_s", "precopy", "push", "pull",
        "zero_pages", "fault_latency_us", "vcpu_block_s", "throughput_bytes_per_s",
    ):  # fmt: skip
        assert key in data
        assert f"`{key}`" in documented
    assert data["verified"] is True
    assert set(data["precopy"]) == {"rounds", "pages"}
    assert set(data["push"]) == {"pages", "bytes"}
    assert set(data["pull"]) == {"requests", "ahead", "pages"}
    assert set(data["fault_latency_us"]) == {"count", "mean", "p50", "p99", "max", "histogram"}


def test_a_guest_that_was_damaged_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from migrate.cli import loopback

    def damage(world: World, spec: GuestSpec) -> Any:
        domain = world.destination.open(spec.name)
        domain.suspend()
        domain.write_pages(pfn_array([700]), b"x" * 4096)
        domain.resume()
        domain.close()
        return verify_migrated(world, spec)

    monkeypatch.setattr(loopback, "this_program", lambda: PROGRAM)
    monkeypatch.setattr(loopback, "verify_migrated", damage)
    with pytest.raises(MigrationError, match="the guest was damaged"):
        loopback.loopback_command.main(["--memory", "4M", "--rate", "2000"], standalone_mode=False)
    assert "damaged: 1 of 1024 pages differ" in capsys.readouterr().out


def test_a_loopback_whose_sender_dies_shows_its_log() -> None:
    options = ["--memory", "8M", "--rate", "100", "--bandwidth", "64K", "--strategy", "postcopy"]
    with zygote.Popen(
        [*PROGRAM, "loopback", *options], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "postcopy" not in (line := process.stderr.readline()):
            assert line
        for pid in children(process.pid):
            if b"sender" in command(pid):
                os.kill(pid, signal.SIGKILL)
        _out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert (
        "--- sender ---" in err
        and "sender ready" in err
        and "ended in the middle of the request" in err
    )


def test_loopback_starts_its_daemons_as_it_was_started_itself(tmp_path: Path) -> None:
    """The program of a distribution's package finds its modules by itself; ``python -m`` does not
    find them.
    """
    program = tmp_path / "program"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from migrate.cli.loopback import this_program\nprint(*this_program())\n"
    )
    command = [sys.executable, "-s", "-P", str(program)]
    options = ["loopback", "--memory", "4M"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == command


def test_loopback_leaves_nothing_behind() -> None:
    """The command and the daemons that it starts are executed; in most other tests the zygote forks
    them.
    """
    with tempfile.TemporaryDirectory() as place:  # a short path, because sockets are made there
        environment = {**os.environ, "TMPDIR": place}
        subprocess.run(
            [*PROGRAM, "loopback", "--memory", "4M"],
            check=True,
            capture_output=True,
            env=environment,
            timeout=60,
        )
        assert list(Path(place).iterdir()) == []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert place.encode() not in process.read_bytes()


def test_the_life_of_a_simulated_guest(world: World, name: str) -> None:
    host = ["--host", str(world.directory / "source.sock")]
    assert run("simulated-guest", "create", name, *host, "--memory", "4M").returncode == 0
    assert_refused(run("simulated-guest", "create", name, *host, "--memory", "4M"), "there already")
    assert name in run("simulated-guest", "list", *host).stdout
    assert (
        "1024 pages are what the guest wrote"
        in run("simulated-guest", "verify", name, *host).stdout
    )
    domain = world.source.open(name)
    domain.suspend()
    domain.write_pages(pfn_array([700]), b"x" * 4096)
    domain.resume()
    domain.close()
    assert_refused(run("simulated-guest", "verify", name, *host), "1 of 1024 pages differ")
    assert run("simulated-guest", "destroy", name, *host).returncode == 0
    assert name not in run("simulated-guest", "list", *host).stdout


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


def test_preflight_of_a_host_and_of_a_guest(world: World, name: str) -> None:
    boot(world, name)
    host = ("--simulated", world.directory / "source.sock")
    told = run("preflight", *host)
    assert told.returncode == 0 and "ready; pages are evicted in batches" in told.stdout
    told = run("preflight", name, *host, "--json")
    assert json.loads(told.stdout) == {
        "ready": True,
        "problems": [],
        "warnings": [],
        "populate_evicted": "native",
        "limits": [],
    }
    assert_refused(run("preflight", "nobody", *host), "no such domain")
    with loopback_world(64 * MIB, host_options=("--no-paging",), daemons=False) as unfit:
        told = run("preflight", "--simulated", unfit.directory / "destination.sock")
        assert_refused(told, "this host: this hypervisor is built without memory paging")


def test_preflight_without_a_xen() -> None:
    assert_refused(run("preflight"), "--simulated SOCKET")


def test_help_teaches() -> None:
    top = run("--help").stdout
    for command in ("migrate", "list", "sender", "receiver", "simulated-host", "loopback"):
        assert command in top
        assert run(command, "--help").returncode == 0
    # The first sentence of each command fits a terminal of 80 columns.
    assert "..." not in top.partition("Commands:")[2]
    about = "MIGRATION is the guest's name, or at least the first eight characters"
    commands = "show watch postcopy-now set pause resume cancel reconnect decide"
    for command in commands.split():
        assert about in " ".join(run(command, "--help").stdout.split())
    assert run("--version").stdout.startswith("xen-postcopy, version ")
    assert "Xen" in run("--version").stdout.splitlines()[1]


def test_list(world: World, name: str) -> None:
    boot(world, name)
    assert migrate(world, name).returncode == 0
    sockets = ["--socket", str(world.sender_socket), "--socket", str(world.receiver_socket)]
    lines = [line for line in run("list", *sockets).stdout.splitlines() if name in line]
    assert len(lines) == 2
    assert all("completed" in line for line in lines)
    assert any(
        entry["domain"] == name for entry in json.loads(run("list", "--json", *sockets).stdout)
    )


@pytest.mark.parametrize("command", [["list"], ["list", "--json"], ["show", "NAME"]])
def test_a_daemon_that_was_named_and_does_not_run_is_reported(
    world: World, name: str, tmp_path: Path, command: list[str]
) -> None:
    boot(world, name)
    assert migrate(world, name).returncode == 0
    words = [name if word == "NAME" else word for word in command]
    gone = tmp_path / "receiver.sock"
    shown = run(*words, "--socket", world.sender_socket, "--socket", gone)
    assert_refused(shown, f"no daemon at {gone}: No such file or directory")
    assert name in shown.stdout


def test_the_port_of_a_sender_is_understood_as_one(world: World, name: str) -> None:
    spec = boot(world, name)
    port = world.ask("sender", command="status")["port"]
    refused = migrate(world, name, to=f"127.0.0.1:{port}")
    assert_refused(refused, "this is a sender, which has no such session; receivers listen on port")
    assert_unharmed(world, spec)


def test_ctrl_c_ends_watch_with_one_line(world: World, name: str) -> None:
    boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    socket = ("--socket", world.sender_socket)
    migrating = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "4M")], stderr=subprocess.PIPE, text=True
    )
    with migrating:
        assert migrating.stderr is not None and "precopy" in migrating.stderr.readline()
        watch = [*PROGRAM, "watch", name, *map(str, socket)]
        with zygote.Popen(watch, stderr=subprocess.PIPE, text=True) as watching:
            assert watching.stderr is not None and "precopy" in watching.stderr.readline()
            watching.send_signal(signal.SIGINT)
            output = watching.stderr.read().splitlines()
        assert watching.returncode == 130 and output[-1] == "xen-postcopy: interrupted"
        assert "" not in output
        switched = run("postcopy-now", name, *socket)
        assert switched.stderr == f"{name}: the sender ends precopy and switches over\n"
        assert run("cancel", name, *socket).returncode in (0, 1)
        migrating.stderr.read()


CLIENT_COMMANDS = """
import contextlib, sys
from migrate.cli import cli
from migrate.errors import MigrationError

sender, receiver = sys.argv[1:]
cli.main(["list", "--socket", sender, "--socket", receiver], standalone_mode=False)
for command in (
    ["show", "stranger"], ["watch", "stranger"], ["reconnect", "stranger"], ["cancel", "stranger"],
    ["postcopy-now", "stranger"], ["decide", "stranger", "here"], ["pause", "stranger"],
    ["resume", "stranger"], ["set", "stranger", "--bandwidth", "1G"],
    ["migrate", "stranger", "localhost"],
):
    try:
        cli.main([*command, "--socket", sender], standalone_mode=False)
    except MigrationError as error:
        assert "stranger" in str(error)
    else:
        sys.exit(f"{command} was not refused")
print("imported:", *{"numpy", "trio", "msgpack", "cffi"} & set(sys.modules))
"""


def test_a_client_command_imports_only_what_it_needs(world: World) -> None:
    """Each of these modules would make the command slower to start, and most commands are run again
    and again.
    """
    sockets = [str(world.sender_socket), str(world.receiver_socket)]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT_COMMANDS, *sockets],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


# ---- Ctrl-C ----
def interrupt_when(
    world: World, spec: GuestSpec, phase: str, *options: str, by: int = signal.SIGINT
) -> tuple[int, str]:
    """Press Ctrl-C when the migration is in a phase.  Returns the status and the output."""
    process = zygote.Popen(
        [*PROGRAM, *request(world, spec.name, *options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    output = ""
    for line in process.stderr:
        output += line
        if f"{spec.name}: {phase}" in line:
            process.send_signal(by)
            break
    with process:
        output += process.stderr.read()
        return process.wait(WAIT_S), output


def test_ctrl_c_before_the_switchover_takes_everything_back(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    status, output = interrupt_when(world, spec, "precopy", "--bandwidth", "4M")
    assert status == 130
    assert output.endswith("xen-postcopy: cancelled by Ctrl-C; the guest continues at the source\n")
    assert_unharmed(world, spec)


def test_ctrl_c_after_the_switchover_leaves_the_migration_to_the_daemons(
    world: World, name: str
) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    status, output = interrupt_when(
        world, spec, "postcopy", "--strategy", "postcopy", "--bandwidth", "8M"
    )
    assert status == 130
    (line,) = world.ask("sender", command="list")["migrations"][-1:]
    assert output.endswith(f"continues in the daemons: {follow(world, line)}\n")
    deadline = time.monotonic() + WAIT_S
    while any(info.name == name for info in world.source.domains()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert verify_migrated(world, spec)[0].problems == []


def follow(world: World, line: dict[str, Any]) -> str:
    return f"{hint(world, line, 'watch')} follows it"


def hint(world: World, line: dict[str, Any], command: str) -> str:
    """Return a command as it can be pasted."""
    return f"`xen-postcopy {command} {line['id'][:8]} --socket {world.sender_socket}`"


def test_sigterm_leaves_the_migration_to_the_daemons(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    options = ("--bandwidth", "8M")
    status, output = interrupt_when(world, spec, "precopy", *options, by=signal.SIGTERM)
    assert status == 130
    (line,) = world.ask("sender", command="list")["migrations"][-1:]
    take_back = f"{hint(world, line, 'cancel')} takes it back before its switchover"
    assert output.endswith(f"continues in the daemons: {follow(world, line)}, {take_back}\n")
    until(lambda: not any(info.name == name for info in world.source.domains()), "it stays")
    assert verify_migrated(world, spec)[0].problems == []


def test_a_cancellation_reads_as_one(world: World, name: str) -> None:
    spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    socket = ("--socket", world.sender_socket)
    migrating = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "4M")], stderr=subprocess.PIPE, text=True
    )
    with migrating:
        assert migrating.stderr is not None and "precopy" in migrating.stderr.readline()
        cancelled = run("cancel", name, *socket)
        assert cancelled.returncode == 0 and cancelled.stdout == ""
        assert cancelled.stderr == f"{name}: cancelled; the guest continues at the source\n"
        output = migrating.stderr.read()
    text = f"{name} was not migrated: cancelled by the operator; the guest continues at the source"
    assert migrating.returncode == 1 and output.endswith(f"xen-postcopy: {text}\n")
    assert_refused(run("watch", name, *socket), text)
    (row,) = [row for row in run("list", *socket).stdout.splitlines() if f" {name} " in row]
    assert row.split()[3] == "cancelled" and row.endswith("  cancelled by the operator")
    until(
        lambda: any(
            (line["domain"], line["problem"])
            == (name, "the sender gave up: cancelled by the operator")
            for line in world.ask("receiver", command="list")["migrations"]
        ),
        "the receiver gives another reason",
    )
    assert_unharmed(world, spec)


def test_a_result_goes_to_standard_output_and_its_summary_does_not(world: World, name: str) -> None:
    boot(world, name)
    done = run(*request(world, name, "--json", "-"))
    assert done.returncode == 0 and f"{name} migrated" in done.stderr
    assert json.loads(done.stdout)["domain"] == name
    assert not Path("-").exists()


def test_the_progress_is_live_on_a_terminal(world: World, name: str) -> None:
    boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    process = zygote.Popen(
        [*PROGRAM, *request(world, name, "--bandwidth", "16M")],
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.wait(WAIT_S) == 0
    assert b"precopy, round 1" in shown
    assert b"\r" in shown
    assert b"%" in shown


def test_a_second_ctrl_c_waits_no_longer(tmp_path: Path) -> None:
    """The daemon does not answer."""
    path = tmp_path / "sender.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(WAIT_S)
        command = [*PROGRAM, "migrate", "guest", "host", "--socket", str(path)]
        with zygote.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _address = listener.accept()
            with connection:
                assert b'"migrate"' in connection.recv(4096)
                connection.sendall(json.dumps({"event": "progress", **PROGRESS}).encode() + b"\n")
                assert (
                    process.stderr is not None
                    and "protected as of 1.5 s ago" in process.stderr.readline()
                )
                process.send_signal(signal.SIGINT)
                assert b'"cancel"' in connection.recv(4096)
                process.send_signal(signal.SIGINT)
                _out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and "not waiting any longer" in err


PROGRESS = {
    "id": "0123456789", "domain": "guest", "phase": "postcopy", "problem": "", "outstanding": 7,
    "checkpoint_age_s": 1.5, "handed_over": True,
}  # fmt: skip


# ---- stopping daemons ----
def test_a_sender_that_is_stopped_takes_its_migrations_back(name: str) -> None:
    with loopback_world(64 * MIB) as world:
        spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
        process = zygote.Popen(
            [*PROGRAM, *request(world, name, "--bandwidth", "4M")],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        assert any("precopy" in line for line in iter(process.stderr.readline, ""))
        world.stop("sender")
        process.stderr.close()
        assert process.wait(WAIT_S) == 1
        assert_unharmed(world, spec)


def test_a_killed_sender_leaves_the_guest_where_it_was(name: str) -> None:
    """This is before the switchover: the hypervisor's guest does not depend on the daemon."""
    with loopback_world(64 * MIB) as world:
        spec = boot(world, name, memory=16 * MIB, workload="idle", zero_permille=0)
        with world.control() as client:
            client.send(
                command="migrate",
                domain=name,
                destination=f"127.0.0.1:{world.port}",
                bandwidth=4 * MIB,
            )
            for answer in client.answers():
                if answer["phase"] == "precopy":
                    break
            world.stop("sender", signal.SIGKILL)
        assert_unharmed(world, spec)


# ---- ends ----
def children(pid: int) -> set[int]:
    """Return the living children of a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(path.parent.name))
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "sig",
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL],
    ids=lambda sig: sig.name,
)
def test_loopback_leaves_no_process_behind(sig: signal.Signals) -> None:
    options = ["--memory", "8M", "--rate", "100", "--bandwidth", "64K", "--strategy", "postcopy"]
    process: subprocess.Popen[bytes] = zygote.Popen(
        [*PROGRAM, "loopback", *options], stderr=subprocess.PIPE
    )
    with process:
        assert process.stderr is not None
        while b"postcopy" not in (line := process.stderr.readline()):
            assert line
        started = children(process.pid)
        assert len(started) == 4
        folders = {
            Path(os.fsdecode(part)).parent
            for pid in started
            for part in command(pid)
            if b"xen-postcopy-" in part
        }
        process.send_signal(sig)
        assert process.wait(WAIT_S) == (-sig if sig is signal.SIGKILL else 128 + sig)
        output = process.stderr.read()
        assert b"`" not in output, "a command is named for daemons that have ended"
        assert sig is not signal.SIGINT or output.endswith(b"xen-postcopy: interrupted\n")
    deadline = time.monotonic() + WAIT_S
    while any(map(runs, started)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert folders
    for folder in folders:
        assert not folder.exists() or sig is signal.SIGKILL
        shutil.rmtree(folder, ignore_errors=True)


def test_the_next_loopback_removes_what_a_killed_one_has_left() -> None:
    """The directory of a loopback that still runs is kept."""
    with tempfile.TemporaryDirectory() as place:  # a short path, because sockets are made there
        environment = {**os.environ, "TMPDIR": place}
        options = [
            "--memory",
            "8M",
            "--rate",
            "100",
            "--bandwidth",
            "64K",
            "--strategy",
            "postcopy",
        ]
        running = [
            subprocess.Popen(
                [*PROGRAM, "loopback", *options], env=environment, stderr=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for process in running:
            assert process.stderr is not None
            while b"postcopy" not in (line := process.stderr.readline()):
                assert line
        folders = set(Path(place).iterdir())
        assert len(folders) == 2
        killed, other = running
        killed.kill()
        killed.communicate()
        subprocess.run(
            [*PROGRAM, "loopback", "--memory", "4M"],
            check=True,
            capture_output=True,
            env=environment,
            timeout=60,
        )
        (left,) = Path(place).iterdir()
        assert other.poll() is None and left in folders
        other.terminate()
        other.communicate()
        assert list(Path(place).iterdir()) == []


def command(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def test_a_daemon_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "sender.sock"
    listener = socket.socket(socket.AF_UNIX)
    with zygote.Popen(
        [*PROGRAM, "cancel", "x", "--socket", path], stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(0.5)  # the command must look for the socket before it exists
        listener.bind(os.fspath(path))
        listener.listen()
        listener.settimeout(WAIT_S)
        connection, _address = listener.accept()
        with connection, listener:
            connection.recv(4096)
            connection.sendall(b'{"event": "error", "message": "here it is"}\n')
        _out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (1, "xen-postcopy: here it is\n")
