# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration of a host: one TOML file for both daemons, every key optional.

Each section is a frozen dataclass.  Its fields are the keys, with their defaults and with the
comments that :mod:`migrate.service.template` writes.  An error names the file, the key and the
reason; an unknown key is an error as well.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
import socket
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.errors import MigrationError
from migrate.lanes.connection import (
    POSTCOPY_SILENCE_S,
    SILENCE_S,
    Terms,
    is_loopback,
)
from migrate.lanes.ends import RECEIVER_PORT, SENDER_PORT
from migrate.lanes.tls import Tls
from migrate.options import (
    MigrationOptions,
    OnTimeout,
    PolicyOptions,
    Strategy,
    check_effect,
)
from migrate.service import values
from migrate.service.files import IrregularFileError, open_regular
from migrate.service.values import Address
from migrate.units import parse_address

CONFIG_FILE = Path("/etc/xen-postcopy/config.toml")
STATE_DIRECTORY = Path("/var/lib/xen-postcopy")
MAX_BYTES = 1024 * 1024


class ConfigError(MigrationError):
    """The configuration is wrong; the text names the file, the key and the reason."""


def _key(parse: Callable[[Any], Any], default: Any, about: str, *, example: Any = None) -> Any:
    """Declare a key.  ``about``: the comment on the key in a written configuration.  ``example``:
    the value that is shown there, if the key has no default that can be written.
    """
    metadata = {"parse": parse, "about": about, "example": default if example is None else example}
    return field(default=default, metadata=metadata)


def _section_of(default: Any, about: str) -> Any:
    """Declare a section.  ``about``: the comment on the section in a written configuration."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class NetworkConfig:
    unencrypted: bool = _key(
        values.flag,
        False,
        "Allow connections with other hosts without TLS: guests' memory crosses the network as it "
        "is, and every program that reaches the ports is a peer.",
    )
    checksums: bool = _key(
        values.flag,
        False,
        "Check each page from end to end (CRC-32), because TCP's checksum is not trusted.  It is "
        "enough if one of the two hosts asks for it.",
    )
    silence_s: float = _key(
        values.silence,
        SILENCE_S,
        "The time in seconds after which a peer that sends nothing counts as dead.  The two hosts "
        "may have different values.",
    )
    postcopy_silence_s: float = _key(
        values.silence,
        POSTCOPY_SILENCE_S,
        "The same, while a guest may wait for pages of the peer.  Linux gives up I/O to a missing "
        "page after 32 s, so a lost link must be noticed early.",
    )


@dataclass(frozen=True)
class TlsConfig:
    certificate: str = _key(
        values.text,
        "",
        "The file with this host's certificate (PEM).  It has the names by which others dial this "
        "host.",
    )
    key: str = _key(
        values.text, "", "The file with the key of the certificate, which only root may read."
    )
    authority: str = _key(
        values.text,
        "",
        "The file with the certificates of the authorities that sign the peers' certificates.",
    )
    peers: tuple[str, ...] = _key(
        values.names, (), "The names of the peers: a peer's certificate must have one of them."
    )

    def below(self, folder: Path) -> TlsConfig:
        """Return the section with relative paths that count from ``folder``."""
        certificate, key, authority = (
            str(folder / path) if path else ""
            for path in (self.certificate, self.key, self.authority)
        )
        return TlsConfig(certificate, key, authority, self.peers)

    @functools.cached_property
    def files(self) -> Tls | None:
        """One object for all connections, because it keeps the last valid contents of the files."""
        if not self.certificate:
            return None
        return Tls(Path(self.certificate), Path(self.key), Path(self.authority), self.peers)


@dataclass(frozen=True)
class SenderConfig:
    listen: Address = _key(
        values.address(SENDER_PORT),
        ("127.0.0.1", SENDER_PORT),
        "The address at which the sender listens for the receivers of xl's migrations.",
    )
    address: str = _key(
        values.dialled,
        "",
        "The address that these receivers dial.  Without it they dial the address in listen, or "
        "this host's name if the sender listens at every address.",
    )
    peer_timeout_s: float = _key(
        values.seconds,
        10.0,
        "How many seconds to wait for a receiver before Xen's own live migration is used.",
    )


@dataclass(frozen=True)
class ReceiverConfig:
    listen: Address = _key(
        values.address(RECEIVER_PORT),
        ("127.0.0.1", RECEIVER_PORT),
        "The address at which the receiver listens for senders.",
    )


@dataclass(frozen=True)
class MigrationConfig:
    strategy: Strategy = _key(
        values.strategy,
        Strategy.HYBRID,
        "How a guest is moved: hybrid (precopy, then the rest while the guest is suspended or by "
        "postcopy, whichever is expected to freeze the guest for less time), postcopy or precopy.",
    )
    max_rounds: int = _key(values.whole, PolicyOptions.max_rounds, "The most rounds of precopy.")
    dirty_threshold: int = _key(
        values.whole,
        PolicyOptions.dirty_threshold,
        "If this number of pages or fewer are dirty, they are sent while the guest is suspended.",
    )
    downtime_target_ms: float = _key(
        values.number,
        PolicyOptions.downtime_target_ms,
        "If the dirty pages can be sent in this number of milliseconds, they are sent while the "
        "guest is suspended.",
    )
    bandwidth: float | None = _key(
        values.bandwidth,
        None,
        "The cap on background copying, in bytes a second.  Faults are not delayed.  Without it "
        "there is no cap.",
        example="1G",
    )
    postcopy_bandwidth: float | None = _key(
        values.postcopy_bandwidth,
        None,
        "The same after the handover, where the guest waits for what is not copied yet.  none: no "
        "cap then.  Without it the cap is that of bandwidth.",
        example="none",
    )
    timeout_s: float | None = _key(
        values.timeout,
        None,
        "The time limit of precopy in seconds; pauses do not count.  Without it there is none.",
        example=300,
    )
    on_timeout: OnTimeout = _key(
        values.on_timeout,
        OnTimeout.POSTCOPY,
        "What follows when precopy has not ended then: postcopy (the guest is switched over, and "
        "the rest follows), cancel (the guest stays at this host) or suspend (the rest is sent "
        "while the guest is suspended).",
    )

    @property
    def policy(self) -> PolicyOptions:
        return PolicyOptions(
            self.max_rounds, self.dirty_threshold, self.downtime_target_ms, self.timeout_s,
            self.on_timeout,
        )  # fmt: skip

    def options(self, strategy: str | None = None) -> MigrationOptions:
        """Return the options of a migration by xl.  ``strategy``: another one, which xl's
        environment names.  Raises :class:`MigrationError` if there is no such strategy, or if the
        options contradict each other.
        """
        try:
            chosen = Strategy(strategy) if strategy else self.strategy
        except ValueError:
            raise MigrationError(f"strategy {strategy!r}: hybrid, postcopy or precopy") from None
        return MigrationOptions(
            chosen,
            self.policy,
            self.bandwidth,
            postcopy_bandwidth_bytes_per_s=self.postcopy_bandwidth,
        )


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics for Prometheus.  Both daemons read this section, and each has an address of its
    own.
    """

    sender_listen: Address | Path | None = _key(
        values.scraped_at,
        None,
        'Where the sender answers scrapes over HTTP, such as "127.0.0.1:9814"; empty: nowhere.',
        example="",
    )
    receiver_listen: Address | Path | None = _key(
        values.scraped_at,
        None,
        'Where the receiver answers scrapes, such as "127.0.0.1:9813"; empty: nowhere.',
        example="",
    )
    textfiles: str = _key(
        values.directory,
        "",
        "The directory in which node_exporter looks for files with metrics, such as "
        "/var/lib/prometheus/node-exporter; empty: no files are written.",
    )
    textfile_every_s: float = _key(
        values.seconds, 15.0, "The time in seconds after which a daemon writes its file again."
    )

    def listen(self, end: str) -> Address | Path | None:
        """Return the address of the daemon ``end``."""
        return self.sender_listen if end == "sender" else self.receiver_listen

    def is_on(self, end: str) -> bool:
        """Whether the daemon ``end`` has metrics."""
        return self.listen(end) is not None or bool(self.textfiles)


@dataclass(frozen=True)
class Config:
    network: NetworkConfig = _section_of(
        NetworkConfig(), "The connections of both daemons with other hosts."
    )
    tls: TlsConfig = _section_of(
        TlsConfig(),
        "Mutual TLS 1.3 with other hosts.  Either all of its keys are given, or none.  A relative "
        "path counts from the folder of this file.  Renewed files are used from the next "
        "connection on, without a restart.  `xen-postcopy init` makes the files.",
    )
    sender: SenderConfig = _section_of(SenderConfig(), "The daemon that guests leave by.")
    receiver: ReceiverConfig = _section_of(ReceiverConfig(), "The daemon that guests come by.")
    migration: MigrationConfig = _section_of(
        MigrationConfig(), "The migrations of xl; `xen-postcopy migrate` has options instead."
    )
    metrics: MetricsConfig = _section_of(
        MetricsConfig(),
        "Metrics for Prometheus (docs/metrics.md), which need python3-prometheus-client.  An "
        "address is of this host alone: HOST:PORT, or the path of a Unix socket.",
    )

    def check_metrics(self, end: str, socket_path: Path) -> None:
        """Raises :class:`ConfigError` if the daemon ``end`` would serve its metrics where it
        listens for something else.  ``socket_path``: its control socket.
        """
        at, listen = self.metrics.listen(end), getattr(self, end).listen
        if isinstance(at, Path):
            if os.path.realpath(at) == os.path.realpath(socket_path):
                raise ConfigError(
                    f"[metrics] {end}_listen: {at} is the control socket of the {end} (--socket): "
                    "choose another path"
                )
        elif at is not None and at == listen and at[1]:
            raise ConfigError(
                f"[metrics] {end}_listen: {at[0]}:{at[1]} is the address of the {end} itself "
                f"(--listen, or listen in [{end}]): choose another port"
            )

    def check_addresses(self) -> None:
        """Raises :class:`ConfigError` if others could read the connections of this host."""
        for name, (host, _port) in (
            ("sender", self.sender.listen),
            ("receiver", self.receiver.listen),
        ):
            if self.tls.files is None and not self.network.unencrypted and not is_loopback(host):
                raise ConfigError(
                    f"[{name}] listen: {host} can be reached by others, and connections are not "
                    "encrypted: make a [tls] section, use a loopback address, or allow it by "
                    "unencrypted = true in [network]"
                )

    @property
    def terms(self) -> Terms:
        """The conditions on which this host connects with other hosts."""
        network = self.network
        return Terms(
            network.checksums,
            network.silence_s,
            network.postcopy_silence_s,
            self.tls.files,
            network.unencrypted,
        )


def load(path: Path | None) -> Config:
    """Load the configuration at ``path``.  ``None``: :data:`CONFIG_FILE`, if there is one.  Raises
    :class:`ConfigError`.
    """
    if path is None:
        if not CONFIG_FILE.exists():
            return Config()
        path = CONFIG_FILE
    try:
        data = tomllib.loads(_text_of(path))
    except IrregularFileError as error:
        raise ConfigError(f"{path}: this is not a file with a configuration") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse(data, str(path), path.parent)


def _text_of(path: Path) -> str:
    """Read a regular file that is no larger than a configuration can be."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {size} bytes are more than a configuration has ({MAX_BYTES})"
            )
        return file.read().decode()


def parse(data: dict[str, Any], source: str, folder: Path = Path()) -> Config:
    """Make the configuration of the contents of a file.  ``source`` names the file in errors.
    ``folder`` is where it is.  Raises :class:`ConfigError`.
    """
    sections = {field.name: type(field.default) for field in dataclasses.fields(Config)}
    made = {}
    for name, given in data.items():
        if name not in sections:
            raise ConfigError(
                f"{source}: [{name}]: there is no such section; there are {', '.join(sections)}"
            )
        if not isinstance(given, dict):
            raise ConfigError(f"{source}: {name}: a section, [{name}]")
        made[name] = _section(sections[name], given, f"{source}: [{name}]")
    config = Config(**made)
    config = dataclasses.replace(config, tls=config.tls.below(folder))
    problem = config.migration.policy.problems()
    if problem:
        key, _, reason = problem.removeprefix("--").partition(" ")
        raise ConfigError(f"{source}: [migration] {key.replace('-', '_')} {reason}")
    try:
        options = config.migration.options()
        # The environment of xl may name another strategy, with which other options have an effect.
        any_strategy = dataclasses.replace(options, strategy=Strategy.HYBRID)
        check_effect(any_strategy, _chosen(config.migration), str)
    except MigrationError as error:
        raise ConfigError(f"{source}: [migration] {error}") from None
    if "textfile_every_s" in _chosen(config.metrics) and not config.metrics.textfiles:
        raise ConfigError(f"{source}: [metrics] textfile_every_s: only with textfiles")
    keys = [field.name for field in dataclasses.fields(config.tls)]
    missing = [key for key in keys if not getattr(config.tls, key)]
    if missing and len(missing) < len(keys):
        raise ConfigError(
            f"{source}: [tls] {missing[0]}: it is missing; certificate, key, authority and peers "
            "go together"
        )
    if config.tls.files is not None:
        try:
            config.tls.files.check()
        except MigrationError as error:
            raise ConfigError(f"{source}: {error}") from None
    if (at := config.metrics.sender_listen) and at == config.metrics.receiver_listen:
        raise ConfigError(
            f"{source}: [metrics] sender_listen, receiver_listen: each daemon needs an address of "
            "its own"
        )
    try:
        config.check_addresses()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return config


def _chosen(section: Any) -> list[str]:
    """Return the keys whose values are not the defaults."""
    return [
        field.name
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    ]


def _section(cls: Any, given: dict[str, Any], where: str) -> Any:
    fields = {field.name: field.metadata["parse"] for field in dataclasses.fields(cls)}
    parsed = {}
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"{where} {key}: there is no such key; there are {', '.join(fields)}")
        try:
            parsed[key] = fields[key](value)
        except (ValueError, MigrationError) as error:
            raise ConfigError(f"{where} {key}: {value!r}: {error}") from None
    return cls(**parsed)


def advertised(sender: SenderConfig, port: int) -> Address:
    """Return the address that a receiver dials to reach the sender that listens at ``port``."""
    host = sender.listen[0]
    if sender.address:
        return parse_address(sender.address, port)
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return (socket.getfqdn() if everywhere else host), port
