# SPDX-License-Identifier: GPL-2.0-or-later
"""``simulated-guest``: guests of a simulated host, as ``xl`` handles those of a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from migrate.cli.options import Number, Size, SocketPath, WholeNumber, absolute, is_given
from migrate.cli.text import echo, json_option, table
from migrate.errors import MigrationError
from migrate.units import counted, human_bytes
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedHypervisor
from xenbackend.simulated.guest import WORKLOADS, GuestSpec, image_bytes
from xenbackend.simulated.verify import verify

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_MEMORY = 256 * 2**20


GUEST_OPTIONS = (
    click.option("--memory", type=Size(), help="Default: the image's size, or 256M."),
    click.option("--vcpus", type=WholeNumber(), default=1, show_default=True, help="1 to 64."),
    click.option(
        "--workload",
        type=click.Choice(list(WORKLOADS)),
        default="random",
        show_default=True,
        help="Which pages the guest touches in what order; hotset: by Zipf's law; idle: few.",
    ),
    click.option(
        "--working-set",
        type=Size(),
        help="How much of its memory the guest touches.  Default: half.",
    ),
    click.option(
        "--write-share",
        type=Number(0, 1),
        default=1.0,
        show_default=True,
        help="The share of the accesses that write.",
    ),
    click.option(
        "--rate",
        type=WholeNumber(),
        help="Accesses of each vCPU in a second.  Default: as many as it can make.",
    ),
    click.option(
        "--stride",
        type=WholeNumber(),
        default=16,
        show_default=True,
        help="Pages between accesses of the stride workload.",
    ),
    click.option(
        "--image",
        type=click.Path(),
        help="A file that is the guest's initial memory (multiple of 4096 bytes).  Default: "
        "generated.",
    ),
    click.option(
        "--zero-share",
        type=Number(0, 1),
        default=0.25,
        show_default=True,
        help="Share of zero pages in generated memory.",
    ),
    click.option(
        "--balloon",
        type=Size(),
        default=0,
        help="Memory that the guest gives away bit by bit while it runs.",
    ),
    click.option(
        "--balloon-back",
        is_flag=True,
        help="The guest takes the memory of --balloon back then, gives it away again, and so on.",
    ),
    click.option(
        "--mmio-hole",
        type=Size(),
        default=0,
        help="Size of a hole for devices behind the first quarter of the memory.",
    ),
    click.option(
        "--seed",
        type=WholeNumber(),
        default=1,
        show_default=True,
        help="The seed of the memory and of the accesses.",
    ),
)


def guest_options(function: F) -> F:
    """Give a command the options that describe a guest; :func:`guest_spec` takes their values."""
    for option in reversed(GUEST_OPTIONS):
        function = option(function)
    return function


def guest_spec(
    name: str, memory: int | None, vcpus: int, workload: str, working_set: int | None,
    write_share: float, rate: int | None, stride: int, image: str | None, zero_share: float,
    balloon: int, balloon_back: bool, mmio_hole: int, seed: int,
) -> GuestSpec:  # fmt: skip
    """Raises :class:`GuestOptionError`, and ``UsageError`` for options that need another one."""
    if balloon_back and not balloon:
        raise click.UsageError("--balloon-back: only with --balloon")
    if workload != "stride" and is_given("stride"):
        raise click.UsageError(f"--stride {stride}: only with --workload stride")
    if image is not None and is_given("zero_share"):
        raise click.UsageError(f"--zero-share {zero_share:g}: not with --image, which has zeros")
    if image is not None:
        image = str(absolute(image))
        memory = memory or image_bytes(image)
    spec = GuestSpec(
        name, DEFAULT_MEMORY if memory is None else memory, vcpus, workload, working_set,
        round(write_share * 1000), rate, stride, image, round(zero_share * 1000), balloon // 4096,
        balloon_back=balloon_back, mmio_hole_bytes=mmio_hole, seed=seed,
    )  # fmt: skip
    spec.check_image()
    return spec


@click.group("simulated-guest")
def simulated_guest_command() -> None:
    """Handle the guests of a simulated host."""


host_option = click.option(
    "--host",
    "host_path",
    type=SocketPath(),
    required=True,
    help="The simulated host's socket.",
)


@simulated_guest_command.command("create")
@click.argument("name")
@host_option
@guest_options
@json_option
def create(name: str, host_path: Path, as_json: bool, **options: Any) -> None:
    """Boot a guest."""
    spec = guest_spec(name, **options)
    domain = SimulatedHypervisor(host_path).create_guest(spec.to_bytes())
    facts = {
        "name": name, "domid": domain.domid, "memory_bytes": spec.memory_bytes,
        "vcpus": spec.vcpus, "workload": spec.workload,
    }  # fmt: skip
    text = (
        f"{name}: domain {domain.domid}, {human_bytes(spec.memory_bytes)}, "
        f"{counted(spec.vcpus, 'vCPU')}, {spec.workload}"
    )
    echo(json.dumps(facts) if as_json else text)


@simulated_guest_command.command("list")
@host_option
@json_option
def list_guests(host_path: Path, as_json: bool) -> None:
    """List the host's domains."""
    domains = SimulatedHypervisor(host_path).domains()
    if as_json:
        facts = [
            {
                "domid": info.domid, "name": info.name, "memory_bytes": info.tot_pages * 4096,
                "vcpus": info.vcpus, "state": info.state.value, "reason": info.reason,
            }
            for info in domains
        ]  # fmt: skip
        echo(json.dumps(facts, indent=2))
        return
    titles = ("ID", "NAME", "MEMORY", "VCPUS", "STATE")
    rows = [
        (
            info.domid,
            info.name,
            human_bytes(info.tot_pages * 4096),
            info.vcpus,
            f"{info.state.value} {info.reason}",
        )
        for info in domains
    ]
    echo(table(titles, rows, numbers="ID MEMORY VCPUS"))


@simulated_guest_command.command("verify")
@click.argument("name")
@host_option
@json_option
def verify_guest(name: str, host_path: Path, as_json: bool) -> None:
    """Check the guest's memory against what the guest wrote.

    The guest is stopped for a moment.
    The guest's options are taken from the host; `loopback` compares with its own options.
    """
    domain = SimulatedHypervisor(host_path).open(name)
    spec = GuestSpec.from_bytes(domain.config().platform)
    domain.suspend()
    try:
        result = verify(domain, spec)
    finally:
        if domain.info().state is DomainState.SUSPENDED:
            domain.resume()
    if not result.ok:
        raise MigrationError(f"{name}: " + "; ".join(result.problems))
    text = f"{name}: {result.pages} pages are what the guest wrote"
    facts = {"name": name, "verified": True, "pages": result.pages}
    echo(json.dumps(facts) if as_json else text)


@simulated_guest_command.command("destroy")
@click.argument("name")
@host_option
def destroy(name: str, host_path: Path) -> None:
    """End the guest."""
    SimulatedHypervisor(host_path).open(name).destroy()
