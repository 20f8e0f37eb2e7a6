# SPDX-License-Identifier: GPL-2.0-or-later
"""``loopback``: a migration from beginning to end on this machine, and its verification."""

from __future__ import annotations

import functools
import signal
import sys
from pathlib import Path
from typing import Any

import click

from migrate.cli.guests import guest_options, guest_spec
from migrate.cli.migrate import shown, summary, write_json
from migrate.cli.options import (
    STDOUT,
    STRATEGY_OPTIONS,
    migration_request,
    report_option,
    strategy_options,
)
from migrate.cli.report.command import answers_of, check_installed, write_report
from migrate.cli.text import echo
from migrate.cli.world import loopback_world, verify_migrated, wait_for_steps
from migrate.errors import MigrationError
from migrate.units import counted, human_bytes
from xenbackend.simulated.guest import GuestSpec, available_bytes

GUEST = "guest"


def check_memory(spec: GuestSpec) -> None:
    """Raises :class:`MigrationError` if this machine has too little memory.  Otherwise the kernel
    would kill a process to make room.
    """
    needed, available = 2 * spec.content_bytes, available_bytes()
    if needed > available:
        raise MigrationError(
            f"a guest of {human_bytes(spec.memory_bytes)} takes up to {human_bytes(needed)} at its "
            f"two hosts together, and this machine has {human_bytes(available)} available: choose "
            "a smaller --memory"
        )


def this_program() -> list[str]:
    """Return the command that started this process, without the arguments of the program.  The
    package of a distribution has its modules where ``python -m`` does not find them.
    """
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]


def _end(number: int, _frame: object) -> None:
    """Exit, which ends the processes that were started and removes their files."""
    raise SystemExit(128 + number)


@click.command("loopback")
@guest_options
@strategy_options
@report_option
def loopback_command(json_path: Path | None, report_path: Path | None, **options: Any) -> None:
    """Migrate a guest on this machine, and verify it.

    Two simulated hosts, a sender and a receiver are started as separate processes, which
    communicate over TCP on the loopback interface.  A guest that keeps writing is booted and
    migrated.  Then every byte of its memory is checked, and everything is cleaned up, also after
    Ctrl-C.
    """
    names = [option.field for option in STRATEGY_OPTIONS if option.field in options]
    strategy = {name: options.pop(name) for name in names}
    request = migration_request(**strategy)
    if json_path is not None and json_path == report_path:
        where = "standard output" if json_path == STDOUT else str(json_path)
        raise click.UsageError(f"--json and --report would both write to {where}")
    spec = guest_spec(GUEST, **options)
    check_memory(spec)
    if report_path is not None:
        check_installed()
    show = functools.partial(echo, err=STDOUT in (json_path, report_path))
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    with loopback_world(spec.memory_bytes, program=this_program()) as world:
        show(
            f"booting a guest: {human_bytes(spec.memory_bytes)}, {counted(spec.vcpus, 'vCPU')}, "
            f"{spec.workload} over {human_bytes(spec.working_pages * 4096)}"
        )
        guest = world.source.create_guest(spec.to_bytes())
        wait_for_steps(guest, 5 if spec.workload == "idle" else min(1000, spec.rate or 1000))
        guest.close()
        with world.control() as client:
            destination = f"127.0.0.1:{world.port}"
            client.send(command="migrate", domain=GUEST, destination=destination, **request)
            result = shown(client)
        answers = answers_of(world, GUEST) if report_path is not None else []
        verification, guest_view = verify_migrated(world, spec)
        world.check_alive()
    result = {"verified": verification.ok, **result, "guest": guest_view}
    show(summary(result))
    if guest_view["faults"]:
        show(
            f"  as the guest saw it: {counted(guest_view['faults'], 'fault')}, median "
            f"{guest_view['p50_us']:.0f} us, longest {guest_view['max_us'] / 1000:.1f} ms"
        )
    if verification.ok:
        show(
            f"verified: all {verification.pages} pages are what the guest wrote, and the guest "
            "runs at the destination"
        )
    else:
        show("damaged: " + "; ".join(verification.problems))
    write_json(json_path, result)
    if report_path is not None:
        from migrate.cli.report.sections import report_of  # imports matplotlib

        write_report(report_path, report_of(answers, guests_own=guest_view["histogram_us"]))
    if not verification.ok:
        raise MigrationError("the guest was damaged")
