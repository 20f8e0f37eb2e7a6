# SPDX-License-Identifier: GPL-2.0-or-later
"""Option types and groups of options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from migrate.control import client
from migrate.errors import MigrationError
from migrate.options import LEAST_BANDWIDTH, MAX_CHECKPOINT_MS, PolicyOptions
from migrate.units import parse_address, parse_size, shortened

F = TypeVar("F", bound=Callable[..., Any])
CHECKPOINT_EVERY_S = 1.0


class OptionType(click.ParamType):  # type: ignore[type-arg]
    """The base of the types below.  That of click takes no argument before click 8.4."""


class Size(OptionType):
    """A number of bytes: ``4096``, ``64K``, ``512M``, ``1G``, ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(OptionType):
    """A number within bounds.  ``nan`` is outside of all bounds."""

    name = "number"

    def __init__(self, least: float, most: float):
        self._least, self._most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if not self._least <= number <= self._most:
            self.fail(
                f"{shortened(value)!r} is not a number from {self._least:g} to {self._most:g}.",
                param,
                ctx,
            )
        return number


class WholeNumber(OptionType):
    """A whole number within bounds.  All numbers that are counted here fit into 64 bits."""

    name = "integer"

    def __init__(self, least: int = -(2**63), most: int = 2**63 - 1):
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:  # no number, or too many digits
            self.fail(f"{shortened(value)!r} is not a valid integer.", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(
                f"{shortened(value)!r} is not a number from {self._least} to {self._most}.",
                param,
                ctx,
            )
        return number


class HostPort(OptionType):
    """``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``, as text."""

    name = "address"

    def __init__(self, default_port: int = 0):
        self._default_port = default_port

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_address(value, self._default_port)
        except MigrationError as error:
            self.fail(f"{error}.", param, ctx)
        return str(value)


def sender_socket() -> Path:
    """Return the absolute path of the local sender's control socket."""
    return Path(client.sender_socket()).absolute()


def receiver_socket() -> Path:
    """Return the absolute path of the local receiver's control socket."""
    return Path(client.receiver_socket()).absolute()


class SocketPath(click.Path):
    """The path of a socket.  If XEN_POSTCOPY_SOCKETS names a folder, a relative path counts from
    it.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        folder = os.environ.get(client.SOCKETS)
        return Path(folder, path).absolute() if folder else path


STDOUT = Path("-")


class ResultFile(click.Path):
    """A file for the result, or :data:`STDOUT`.  A path that cannot be written is refused before
    the migration begins.
    """

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if path == STDOUT or path.is_fifo():  # a FIFO's reader may come later
            return path
        is_new = not os.path.lexists(path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
            if is_new:
                path.unlink()
        except OSError as error:
            self.fail(f"File {str(path)!r} cannot be written: {error.strerror}.", param, ctx)
        return path


def socket_option(default: Callable[[], Path], whose: str) -> Callable[[F], F]:
    return click.option(
        "--socket", "socket_path", type=SocketPath(), default=default,
        help=f"Control socket of {whose}.  Default: {default().name} in {client.RUN_DIRECTORY}, or "
        f"in ${client.SOCKETS}.",
    )  # fmt: skip


config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The configuration.  Default: /etc/xen-postcopy/config.toml, if there is one.",
)


def simulated_option(function: F) -> F:
    return click.option(
        "--simulated", type=SocketPath(), metavar="SOCKET",
        help="Work with the simulated host that listens there, instead of this machine's Xen.",
    )(function)  # fmt: skip


DEFAULTS = PolicyOptions()
STRATEGY_OPTIONS = (
    click.option(
        "--strategy",
        type=click.Choice(["hybrid", "postcopy", "precopy"]),
        default="hybrid",
        show_default=True,
        help="hybrid: precopy while it helps, then the rest while the guest is suspended or by "
        "postcopy, whichever freezes it for less time.  postcopy: the guest is suspended at once, "
        "and its memory follows.  precopy: all memory is sent before the handover.",
    ),
    click.option(
        "--max-rounds",
        type=WholeNumber(),
        default=DEFAULTS.max_rounds,
        show_default=True,
        help="The most rounds of precopy.",
    ),
    click.option(
        "--dirty-threshold",
        type=WholeNumber(),
        default=DEFAULTS.dirty_threshold,
        show_default=True,
        metavar="PAGES",
        help="With this many dirty pages or fewer, send the rest while the guest is suspended.",
    ),
    click.option(
        "--downtime-target",
        type=float,
        default=DEFAULTS.downtime_target_ms,
        show_default=True,
        metavar="MS",
        help="If the rest takes at most so many milliseconds, send it while the guest is "
        "suspended.",
    ),
    click.option(
        "--bandwidth",
        type=Size(),
        metavar="BYTES/S",
        help="Cap on background copying; faults are not delayed.",
    ),
    click.option(
        "--protect",
        is_flag=True,
        help="Until all memory has arrived, have the destination send back what the guest writes "
        "there, so that the guest can continue here if the destination is lost: see `xen-postcopy "
        "decide`.",
    ),
    click.option(
        "--checkpoint-every",
        type=Number(0.001, MAX_CHECKPOINT_MS / 1000),
        metavar="SECONDS",
        help="Seconds between two checkpoints, with --protect; the guest is suspended for a moment "
        f"each time.  Default: {CHECKPOINT_EVERY_S:g}.",
    ),
    click.option(
        "--json",
        "json_path",
        type=ResultFile(),
        metavar="FILE",
        help="The file for the result; -: standard output, with the summary on standard error.",
    ),
)


def strategy_options(function: F) -> F:
    """Give a command the option ``--strategy`` and the options that control a strategy."""
    for option in reversed(STRATEGY_OPTIONS):
        function = option(function)
    return function


def migration_request(
    strategy: str, max_rounds: int, dirty_threshold: int, downtime_target: float,
    bandwidth: int | None, protect: bool, checkpoint_every: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The part of a ``migrate`` request that the strategy options make."""
    problem = PolicyOptions(max_rounds, dirty_threshold, downtime_target).problems()
    if problem:
        raise click.UsageError(problem)
    if bandwidth is not None and bandwidth < LEAST_BANDWIDTH:
        raise click.UsageError(
            f"--bandwidth {bandwidth}: at least one page ({LEAST_BANDWIDTH} bytes) a second; "
            "without --bandwidth there is no cap"
        )
    if checkpoint_every is not None and not protect:
        raise click.UsageError(f"--checkpoint-every {checkpoint_every:g}: only with --protect")
    if protect and strategy == "precopy":
        raise click.UsageError(
            "--strategy precopy has nothing to protect: with it the guest arrives as a whole"
        )
    return {
        "strategy": strategy,
        "policy": {
            "max_rounds": max_rounds,
            "dirty_threshold": dirty_threshold,
            "downtime_target_ms": downtime_target,
        },
        "bandwidth": bandwidth,
        "checkpoint_every_s": (checkpoint_every or CHECKPOINT_EVERY_S) if protect else None,
    }
