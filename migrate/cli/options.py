# SPDX-License-Identifier: GPL-2.0-or-later
"""Option types and groups of options that several commands share."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from migrate.control import client
from migrate.errors import MigrationError
from migrate.lanes.ends import RECEIVER_PORT
from migrate.options import (
    CHANGEABLE,
    LEAST_BANDWIDTH,
    MAX_CHECKPOINT_MS,
    MAX_TIMEOUT_S,
    NO_CAP,
    MigrationOptions,
    OnTimeout,
    PolicyOptions,
    Strategy,
    changed,
    check_effect,
)
from migrate.units import parse_address, parse_dialled, parse_size, shortened
from xenbackend.unix import STARTING_S

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


class Cap(Size):
    """A number of bytes a second, or ``none``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "none":
            return NO_CAP
        rate = super().convert(value, param, ctx)
        if rate < LEAST_BANDWIDTH:
            self.fail(
                f"{shortened(value)!r}: at least one page ({LEAST_BANDWIDTH} bytes) a second, or "
                "none for no cap.",
                param,
                ctx,
            )
        return rate


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


class TimeLimit(Number):
    """A number of seconds, or ``none``, which is 0."""

    def __init__(self) -> None:
        super().__init__(0.001, MAX_TIMEOUT_S)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        return 0.0 if value == "none" else super().convert(value, param, ctx)


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


class FirstLetters(OptionType):
    """One of some words, or its first letters, in any case."""

    name = "word"

    def __init__(self, words: Iterable[str]):
        self._words = list(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        begun = str(value).strip().lower()
        found = [word for word in self._words if begun and word.startswith(begun)]
        if len(found) != 1:
            known = ", ".join(f"{word[0]} ({word})" for word in self._words)
            self.fail(f"{shortened(value)!r} is none of {known}.", param, ctx)
        return found[0]


class HostPort(OptionType):
    """``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``, as text.  ``listens``: port 0 means any free
    one.
    """

    name = "address"

    def __init__(self, *, listens: bool = False):
        self._parse = parse_address if listens else parse_dialled

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            self._parse(value, RECEIVER_PORT)
        except MigrationError as error:
            self.fail(f"{error}.", param, ctx)
        return str(value)


def absolute(path: str | Path) -> Path:
    """Return the path from the root.  Raises :class:`MigrationError` for a relative one if the
    working directory was removed.
    """
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise MigrationError(
            f"{path}: the working directory was removed: change to another one"
        ) from None


def sender_socket() -> Path:
    """Return the absolute path of the local sender's control socket."""
    return absolute(client.sender_socket())


def receiver_socket() -> Path:
    """Return the absolute path of the local receiver's control socket."""
    return absolute(client.receiver_socket())


class SocketPath(click.Path):
    """The path of a socket.  If XEN_POSTCOPY_SOCKETS names a folder, a relative path counts from
    it.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        folder = os.environ.get(client.SOCKETS)
        return absolute(Path(folder, path)) if folder else path


STDOUT = Path("-")


class ResultFile(click.Path):
    """A file for the result, or :data:`STDOUT`.  A path that cannot be written is refused before
    the migration begins.
    """

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        is_new = not os.path.lexists(path)
        try:
            if path == STDOUT or path.is_fifo():  # a FIFO's reader may come later
                return path
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
            if is_new:
                path.unlink()
        except OSError as error:
            self.fail(f"File {str(path)!r} cannot be written: {error.strerror}.", param, ctx)
        return path


report_option = click.option(
    "--report",
    "report_path",
    type=ResultFile(),
    metavar="FILE",
    help="The file for a report with pictures (HTML); -: standard output.",
)


def socket_option(
    default: Callable[[], Path], whose: str, *, is_made: bool = False
) -> Callable[[F], F]:
    """``is_made``: the command makes the socket, and does not wait for its daemon."""
    wait = f"  The command waits up to {STARTING_S:g} s for a daemon that is just starting."
    return click.option(
        "--socket", "socket_path", type=SocketPath(), default=default,
        help=f"Control socket of {whose}.  Default: {default().name} in {client.RUN_DIRECTORY}, or "
        f"in ${client.SOCKETS}.{'' if is_made else wait}",
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


@dataclass(frozen=True)
class Declared:
    """An option as click has it.  ``names``: the option, and the field of ``migrate/options.py`` if
    that has another name.
    """

    names: tuple[str, ...]
    attributes: dict[str, Any]

    @property
    def field(self) -> str:
        return self.names[-1].removeprefix("--").replace("-", "_")


def _option(*names: str, **attributes: Any) -> Declared:
    return Declared(names, attributes)


STRATEGY_OPTIONS = (
    _option(
        "--strategy",
        type=click.Choice(["hybrid", "postcopy", "precopy"]),
        default="hybrid",
        show_default=True,
        help="hybrid: precopy while it helps, then the rest while the guest is suspended or by "
        "postcopy, whichever freezes it for less time.  postcopy: the guest is suspended at once, "
        "and its memory follows.  precopy: all memory is sent before the handover.",
    ),
    _option(
        "--max-rounds",
        type=WholeNumber(),
        default=DEFAULTS.max_rounds,
        show_default=True,
        help="The most rounds of precopy.",
    ),
    _option(
        "--dirty-threshold",
        type=WholeNumber(),
        default=DEFAULTS.dirty_threshold,
        show_default=True,
        metavar="PAGES",
        help="With this many dirty pages or fewer, send the rest while the guest is suspended.",
    ),
    _option(
        "--downtime-target",
        "downtime_target_ms",
        type=float,
        default=DEFAULTS.downtime_target_ms,
        show_default=True,
        metavar="MS",
        help="If the rest takes at most so many milliseconds, send it while the guest is "
        "suspended.",
    ),
    _option(
        "--timeout",
        "timeout_s",
        type=TimeLimit(),
        metavar="SECONDS",
        help="The time limit of precopy, in which pauses do not count.  none: no limit, the "
        "default.",
    ),
    _option(
        "--on-timeout",
        type=click.Choice([action.value for action in OnTimeout]),
        help="What follows when precopy has not ended within --timeout.  postcopy: switch over, "
        "and the rest follows.  cancel: the guest stays here.  suspend: send the rest while the "
        f"guest is suspended, however long that takes.  Default: {DEFAULTS.on_timeout.value}.",
    ),
    _option(
        "--bandwidth",
        "bandwidth_bytes_per_s",
        type=Cap(),
        metavar="BYTES/S",
        help="Cap on background copying; faults are not delayed.  none: no cap, the default.",
    ),
    _option(
        "--postcopy-bandwidth",
        "postcopy_bandwidth_bytes_per_s",
        type=Cap(),
        metavar="BYTES/S",
        help="Cap on background copying after the handover.  The guest then waits for pages that "
        "are not copied.  none: no cap.  Default: that of --bandwidth.",
    ),
    _option(
        "--protect",
        is_flag=True,
        help="Until all memory has arrived, have the destination send back what the guest writes "
        "there, so that the guest can continue here if the destination is lost: see the command "
        "`decide`.",
    ),
    _option(
        "--checkpoint-every",
        type=Number(0.001, MAX_CHECKPOINT_MS / 1000),
        metavar="SECONDS",
        help="Seconds between two checkpoints, with --protect; the guest is suspended for a moment "
        f"each time.  Default: {CHECKPOINT_EVERY_S:g}.",
    ),
    _option(
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
        function = click.option(*option.names, **option.attributes)(function)
    return function


def changeable_options(function: F, but: Sequence[str] = ()) -> F:
    """Give a command those of these options that can be changed while a migration runs, except
    those of the fields ``but``.  An option that is not given is ``None``.
    """
    for option in reversed(STRATEGY_OPTIONS):
        if option.field in CHANGEABLE and option.field not in but:
            attributes = {**option.attributes, "default": None, "show_default": False}
            attributes["help"] = re.sub(r"  Default: .*|, the default", "", attributes["help"])
            function = click.option(*option.names, **attributes)(function)
    return function


def take_log_dirty_option(whose: str) -> Callable[[F], F]:
    return click.option(
        "--take-log-dirty",
        is_flag=True,
        help=f"If log-dirty is on for {whose}, switch it off first: only if no other program uses "
        "it any more.",
    )


def policy_options(function: F) -> F:
    """Give a command those of these options, without the caps on bandwidth."""
    return changeable_options(function, ("bandwidth_bytes_per_s", "postcopy_bandwidth_bytes_per_s"))


def is_given(name: str) -> bool:
    """Whether the user has given the option of this name to the command that runs, so that its
    value is no default.
    """
    context = click.get_current_context(silent=True)
    source = context and context.get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def values_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the given options, by the names of their fields, as a request has them:
    ``None`` for no limit.
    """
    return {
        name: None if name in ("bandwidth_bytes_per_s", "timeout_s") and not value else value
        for name, value in given.items()
        if value is not None
    }


def migration_request(
    strategy: str, protect: bool, checkpoint_every: float | None, **changeable: Any
) -> dict[str, Any]:
    """The part of a ``migrate`` request that the strategy options make."""
    if checkpoint_every is not None and not protect:
        raise click.UsageError(f"--checkpoint-every {checkpoint_every:g}: only with --protect")
    try:
        options = dataclasses.replace(
            changed(MigrationOptions(), values_of(changeable)),
            strategy=Strategy(strategy),
            checkpoint_every_s=(checkpoint_every or CHECKPOINT_EVERY_S) if protect else None,
        )
        check_effect(options, filter(is_given, changeable))
    except MigrationError as error:
        raise click.UsageError(str(error)) from None
    policy = {**vars(options.policy), "on_timeout": options.policy.on_timeout.value}
    if options.policy.timeout_s is None:  # an earlier release does not have a time limit
        del policy["timeout_s"], policy["on_timeout"]
    return {
        "strategy": strategy,
        "policy": policy,
        "bandwidth": options.bandwidth_bytes_per_s,
        "postcopy_bandwidth": options.postcopy_bandwidth_bytes_per_s,
        "checkpoint_every_s": options.checkpoint_every_s,
    }
