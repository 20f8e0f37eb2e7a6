# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: its meaning, and the errors for a wrong one."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from migrate.options import Strategy
from migrate.service import config, template
from migrate.service.config import (
    Config,
    ConfigError,
    MigrationConfig,
    SenderConfig,
    TlsConfig,
    advertised,
    load,
    parse,
)
from migrate.units import human_bytes, parse_size

TREE = Path(__file__).parents[2]


def read(text: str) -> Config:
    return parse(tomllib.loads(text), "config.toml")


def test_everything_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CONFIG_FILE", tmp_path / "nowhere")
    assert load(None) == Config() == read("")
    monkeypatch.setattr(config, "CONFIG_FILE", tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text("[migration]\nmax_rounds = 3\n")
    assert load(None) == read("[migration]\nmax_rounds = 3")


def test_the_file_that_is_installed_names_every_key_with_its_default() -> None:
    text = (TREE / "systemd/config.toml").read_text()
    assert text == template.configuration(template.INSTALLED, {}), (
        "python -m migrate.service.template > systemd/config.toml"
    )
    assert read(text) == Config()
    uncommented = re.sub(r"(?m)^#(?=[\[a-z])", "", text)
    for example in ('\nbandwidth = "1G"', 'postcopy_bandwidth = "none"', "timeout_s = 300\n"):
        uncommented = uncommented.replace(example, "")
    assert read(uncommented) == Config()
    manual = (TREE / "systemd/man/xen-postcopy.toml.5").read_text()
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(getattr(Config(), section.name)):
            commented = re.search(rf"(?m)^# .+\n#{key.name} = ", text)
            assert commented and key.name in manual, f"[{section.name}] {key.name}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (7, "7"),
        (2.5, "2.5"),
        (3000000.0, "3000000"),
        ('tab\t, quote ", é', r'"tab\t, quote \", é"'),
        (("host1", "10.0.0.1"), '["host1", "10.0.0.1"]'),
        (("host", 8014), '"host:8014"'),
        (("fd00::1", 8014), '"[fd00::1]:8014"'),
        (Strategy.POSTCOPY, '"postcopy"'),
    ],
)
def test_a_value_is_written_as_it_is_read(value: object, text: str) -> None:
    assert template.written(value) == text
    tomllib.loads(f"key = {text}")


def test_a_written_configuration_has_what_is_given_and_no_unknown_key() -> None:
    given: dict[str, dict[str, object]] = {
        "sender": {"listen": ("127.0.0.2", 9)},
        "migration": {"bandwidth": "1M"},
    }
    made = read(template.configuration(("first", "second"), given))
    assert made == Config(
        sender=SenderConfig(("127.0.0.2", 9)), migration=MigrationConfig(bandwidth=2.0**20)
    )
    with pytest.raises(ValueError, match=r"\[sender\] lisen"):
        template.configuration((), {"sender": {"lisen": 1}})


def test_a_path_counts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    names = {"certificate": "host.pem", "key": "/keys/host.key", "authority": "../authority.pem"}
    tls = TlsConfig(**names, peers=("host2",)).below(tmp_path)
    assert (tls.certificate, tls.key) == (f"{tmp_path}/host.pem", "/keys/host.key")
    assert tls.authority == f"{tmp_path}/../authority.pem"
    file = tmp_path / "config.toml"
    file.write_text(template.configuration((), {"tls": {**names, "peers": ("host2",)}}))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/host.pem, /keys/host.key: No such file"):
        load(file)


def test_what_is_given() -> None:
    made = read("""
        [network]
        unencrypted = true
        [sender]
        listen = "[::]:9000"
        [receiver]
        listen = "10.0.0.1"
        [migration]
        strategy = "postcopy"
        max_rounds = 3
        bandwidth = "1.5M"
    """)
    assert made.sender.listen == ("::", 9000)
    assert made.receiver.listen == ("10.0.0.1", 8013)
    assert made.migration.strategy is Strategy.POSTCOPY
    assert made.migration.policy.max_rounds == 3
    assert made.migration.bandwidth == 1.5 * 2**20


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "[sendr]",
            "config.toml: [sendr]: there is no such section; there are network, tls, sender, "
            "receiver, migration, metrics",
        ),
        ("sender = 1", "config.toml: sender: a section, [sender]"),
        ('[sender]\naddress = "host:0"', "[sender] address: 'host:0': address 'host:0': a port"),
        (
            '[migration]\non_timeout = "cancel"',
            "[migration] on_timeout cancel: only with timeout_s, because there is no time limit",
        ),
        ("[metrics]\ntextfile_every_s = 5", "[metrics] textfile_every_s: only with textfiles"),
        (
            "[sender]\nport = 1",
            "config.toml: [sender] port: there is no such key; there are listen, address",
        ),
        ("[sender]\nlisten = 8014", "config.toml: [sender] listen: 8014: an address in quotes"),
        (
            '[sender]\nlisten = "host:x"',
            "config.toml: [sender] listen: 'host:x': address 'host:x': HOST, HOST:PORT",
        ),
        (
            '[sender]\naddress = "host1:80a"',
            "config.toml: [sender] address: 'host1:80a': address 'host1:80a': HOST, HOST:PORT",
        ),
        (
            '[receiver]\nlisten = "0.0.0.0"',
            "config.toml: [receiver] listen: 0.0.0.0 can be reached by others",
        ),
        ("[sender]\npeer_timeout_s = 0", "config.toml: [sender] peer_timeout_s: 0: seconds"),
        (
            "[network]\npostcopy_silence_s = 2",
            "config.toml: [network] postcopy_silence_s: 2: seconds: at least 3, at most 3600",
        ),
        (
            "[network]\nsilence_s = 2",
            "config.toml: [network] silence_s: 2: seconds: at least 3, at most 3600",
        ),
        (
            '[migration]\nstrategy = "fast"',
            "config.toml: [migration] strategy: 'fast': one of hybrid, postcopy",
        ),
        (
            "[migration]\nmax_rounds = 1.5",
            "config.toml: [migration] max_rounds: 1.5: a whole number",
        ),
        (
            "[migration]\nmax_rounds = 0",
            "config.toml: [migration] max_rounds 0: a whole number, 1 to 1000",
        ),
        (
            '[migration]\nbandwidth = "1"',
            "config.toml: [migration] bandwidth: '1': at least one page",
        ),
        ('[tls]\ncertificate = "a.pem"', "config.toml: [tls] key: it is missing"),
        (
            '[tls]\ncertificate = "/a.pem"\nkey = "/a.key"\nauthority = "/ca.pem"\npeers = ["b"]',
            "config.toml: [tls] /a.pem, /a.key: No such file or directory",
        ),
        ("[tls]\ncertificate = 1", "config.toml: [tls] certificate: 1: text in quotes"),
        (
            "[migration]\ndowntime_target_ms = true",
            "config.toml: [migration] downtime_target_ms: True: a number",
        ),
        (
            '[metrics]\nsender_listen = "10.0.0.1:9814"',
            "config.toml: [metrics] sender_listen: '10.0.0.1:9814': 10.0.0.1 can be reached by "
            "others: a loopback address, or the path of a Unix socket",
        ),
        (
            '[metrics]\nreceiver_listen = "127.0.0.1"',
            "config.toml: [metrics] receiver_listen: '127.0.0.1': address '127.0.0.1': HOST:PORT",
        ),
        (
            "[metrics]\nreceiver_listen = 9813",
            "config.toml: [metrics] receiver_listen: 9813: HOST:PORT, or the path of a Unix",
        ),
        (
            '[metrics]\nsender_listen = "localhost:9"\nreceiver_listen = "localhost:9"',
            "config.toml: [metrics] sender_listen, receiver_listen: each daemon needs an address",
        ),
        (
            '[metrics]\ntextfiles = "metrics"',
            "config.toml: [metrics] textfiles: 'metrics': the path of a directory, from / on",
        ),
        (
            "[metrics]\ntextfile_every_s = 0",
            "config.toml: [metrics] textfile_every_s: 0: seconds",
        ),
        ('[tls]\npeers = "b"', "config.toml: [tls] peers: 'b': a list of names"),
        (
            '[network]\nunencrypted = "yes"',
            "config.toml: [network] unencrypted: 'yes': true or false",
        ),
    ],
)
def test_an_error_names_the_file_the_key_and_the_reason(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as info:
        read(text)
    assert what in str(info.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        load(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.write_text("[sender\n")
    with pytest.raises(ConfigError, match=r"broken: .*line 1"):
        load(broken)
    broken.write_text(f"key = {'[' * 100_000}")
    with pytest.raises(ConfigError, match=r"broken: .*recursion"):
        load(broken)


def test_what_a_receiver_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "host.example")
    assert advertised(SenderConfig(("10.0.0.1", 0)), 99) == ("10.0.0.1", 99)
    assert advertised(SenderConfig(("source.example", 0)), 99) == ("source.example", 99)
    assert advertised(SenderConfig(("0.0.0.0", 0)), 99) == ("host.example", 99)
    assert advertised(SenderConfig(("::", 0), "migration.example"), 99) == ("migration.example", 99)
    assert advertised(SenderConfig(("::", 0), "migration.example:5"), 99) == (
        "migration.example",
        5,
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("64K", 65536),
        ("1.5GiB", 3 * 2**29),
        (" 2 mib ", 2**21),
        ("1TB", 2**40),
    ],
)
def test_sizes_are_read_as_people_write_them(text: object, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1,5G", "0x10", True, None])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="such as 512M"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (5 * 2**40, "5.0 TiB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_fits(count: int, text: str) -> None:
    assert human_bytes(count) == text
