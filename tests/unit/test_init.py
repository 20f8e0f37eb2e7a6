# SPDX-License-Identifier: GPL-2.0-or-later
"""``init``: the files of two hosts, of a third one, renewed ones; the answer to each mistake."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate import cli
from migrate.cli import steps
from migrate.cli.authority import Authority, names_of
from migrate.cli.init import checked_name
from migrate.lanes.certificate import findings
from migrate.service.config import Config, load

NOW = datetime.datetime.now(datetime.UTC)
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs ``init`` in a folder of its own, and returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["xen-postcopy", "init", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return call


def host(name: str, directory: str = "xen-postcopy-init") -> Path:
    return Path(directory, "hosts", name)


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_made_is_also_json(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host1,10.0.0.1", "host2", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["authority"] == "xen-postcopy-init/authority"
    first, second = made["hosts"]
    assert (first["host"], first["names"]) == ("host1", ["host1", "10.0.0.1"])
    assert Path(second["directory"]) == host("host2")
    assert run("host2", "--renew", "--json") == 0
    (renewed,) = json.loads(capsys.readouterr().out)["hosts"]
    assert renewed["host"] == "host2" and renewed["until"] >= second["until"]
    assert datetime.datetime.fromisoformat(renewed["until"]) > NOW


def test_each_host_gets_a_folder_that_its_daemons_accept(run: Run) -> None:
    assert run("host1,10.0.0.1", "HOST2,fd00::2,host2.example") == 0
    one, two = (load(host(name) / "config.toml") for name in ("host1", "host2"))
    assert (one.tls.peers, two.tls.peers) == (("host2",), ("host1",))
    assert one.sender.listen == ("0.0.0.0", 8014) and one.sender.address == "host1"
    assert one.receiver.listen == ("0.0.0.0", 8013)
    assert one == dataclasses.replace(
        Config(), tls=one.tls, sender=one.sender, receiver=one.receiver
    )
    for config, names in ((one, ("host1", "10.0.0.1")), (two, ("host2", "fd00::2"))):
        assert config.tls.files is not None
        for name in names:
            assert findings(config.tls.files, name) == []
    assert names_of((host("host2") / "host.pem").read_bytes()) == (
        "host2", "fd00::2", "host2.example",
    )  # fmt: skip


def test_keys_are_their_owner_s_alone(run: Run) -> None:
    assert run("host1", "host2") == 0
    keys = sorted(Path.cwd().rglob("*.key"))
    assert [path.parent.name for path in keys] == ["authority", "host1", "host2"]
    for path in keys:
        assert mode(path) == 0o600 and mode(path.parent) == 0o700
    assert len({path.read_bytes() for path in keys}) == 3


def test_the_written_configuration_has_every_key_with_a_comment(run: Run) -> None:
    assert run("host1", "host2") == 0
    text = (host("host1") / "config.toml").read_text()
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(getattr(Config(), section.name)):
            assert re.search(rf"(?m)^# .+\n#?{key.name} = ", text), f"[{section.name}] {key.name}"


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1"])
def test_a_host_that_is_an_address_listens_there_alone(run: Run, address: str) -> None:
    assert run(address, "host2") == 0
    made = load(host(address) / "config.toml")
    assert made.sender.listen == (address, 8014) and made.receiver.listen == (address, 8013)
    assert made.sender.address == address


def test_nothing_is_replaced_without_force(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host1", "host2") == 0
    before = contents()
    assert run("host2", "host3") == 1
    assert "hosts/host2 is there already: --renew makes a new" in capsys.readouterr().err
    assert contents() == before
    assert run("--force", "host2") == 0
    changed = {path for path, text in contents().items() if text != before[path]}
    assert {path.name for path in changed} == {"host.pem", "host.key"}
    assert {path.parent.name for path in changed} == {"host2"}
    assert load(host("host2") / "config.toml").tls.peers == ("host1",)


def test_a_third_host_has_the_same_authority(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host1", "host2") == 0
    before = contents()
    capsys.readouterr()
    assert run("host3") == 0
    assert before.items() <= contents().items()
    third = load(host("host3") / "config.toml")
    assert third.tls.peers == ("host1", "host2")
    first = load(host("host1") / "config.toml").tls
    assert first.files is not None and third.tls.files is not None
    assert first.files.authority.read_bytes() == third.tls.files.authority.read_bytes()
    said = capsys.readouterr().out
    assert '    host1: peers = ["host2", "host3"]\n' in said
    assert "    ssh root@host1 xen-postcopy preflight --peer host3\n" in said


def test_renewal_leaves_the_configuration(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("host1,10.0.0.1", "host2") == 0
    before = contents()
    capsys.readouterr()
    assert run("--renew") == 0
    changed = {path.name for path, text in contents().items() if text != before[path]}
    assert changed == {"host.pem", "host.key"}
    assert names_of((host("host1") / "host.pem").read_bytes()) == ("host1", "10.0.0.1")
    said = capsys.readouterr().out
    assert "without a" in said and "config.toml" not in said
    assert run("--renew", "host2,host2.example", "--days", "3") == 0
    assert names_of((host("host2") / "host.pem").read_bytes()) == ("host2", "host2.example")
    assert f"until {NOW + datetime.timedelta(days=3):%Y-%m-%d}" in capsys.readouterr().out


def test_a_certificate_ends_no_later_than_its_authority(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("host1", "host2", "--days", "36500") == 0
    end = f"until {NOW + datetime.timedelta(days=3650):%Y-%m-%d}"
    assert capsys.readouterr().out.count(end) == 3


def test_files_of_this_host_are_copied_without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "host1.example")
    assert steps.copy("host1", "x/*") == "cp --preserve=mode x/* /etc/xen-postcopy/"
    assert steps.on("host1", "xen-postcopy list") == "xen-postcopy list"
    assert steps.copy("fd00::2", "x/*") == "scp -p x/* 'root@[fd00::2]:/etc/xen-postcopy/'"


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        ([], 2, "name both"),
        (["host1"], 2, "two hosts migrate guests to each other: name both"),
        (["host1", "host1"], 2, "host1 is named twice"),
        (["host1,h", "host2,h"], 2, "h is named twice"),
        (["host1", "ho st"], 2, "'ho st' is no name of a host and no address"),
        (["host1", "-host"], 2, "No such option"),
        (["host1", "10.0.0.256"], 2, "'10.0.0.256' is no name of a host"),
        (["host1", "*.example"], 2, "'*.example' is no name"),
        (["host1", "../host"], 2, "'../host' is no name"),
        (["host1", "häst"], 2, "'häst' is no name"),
        (["host1", "fe80::1%eth0"], 2, "the zone of an address means something here only"),
        (["host1", "host2", "--days", "0"], 2, "'0' is not a number from 1 to 36500"),
        (["host1", "host2", "--directory", "/dev/null"], 1, "/dev/null: File exists"),
        (["host1", "host2", "--directory", "/proc/new"], 1, "/proc/new: No such file"),
        (["--renew"], 1, "xen-postcopy-init has no hosts: make them without --renew first"),
    ],
)
def test_each_mistake_has_its_own_reason(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], status: int, what: str
) -> None:
    assert run(*words) == status
    written = capsys.readouterr()
    assert what in written.err and written.out == ""
    assert contents() == {}


def authority(directory: Path, made: Authority) -> Path:
    folder = directory / "authority"
    folder.mkdir(parents=True)
    (folder / "authority.pem").write_bytes(made.certificate())
    (folder / "authority.key").write_bytes(made.key())
    return folder


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda _folder: None, "has expired on 2020-"),
        (lambda folder: (folder / "authority.key").unlink(), "authority.key: No such file"),
        (
            lambda folder: (folder / "authority.pem").write_text("x"),
            "not a certificate and its key",
        ),
        (
            lambda folder: (folder / "authority.key").write_bytes(Authority.make(NOW).key()),
            "its key belongs to another certificate",
        ),
    ],
    ids=["expired", "no key", "garbage", "another key"],
)
def test_an_authority_that_cannot_sign_is_named(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    spoil: Callable[[Path], object], what: str,
) -> None:  # fmt: skip
    long_ago = datetime.datetime(2010, 6, 1, tzinfo=datetime.UTC)
    spoil(authority(tmp_path / "xen-postcopy-init", Authority.make(long_ago)))
    before = contents()
    assert run("host1", "host2") == 1
    assert what in capsys.readouterr().err
    assert contents() == before


def test_a_host_that_the_folder_lacks_cannot_be_renewed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("host1", "host2") == 0
    assert run("--renew", "host3") == 1
    assert "has no host host3; it has host1, host2" in capsys.readouterr().err
    (host("host1") / "host.pem").write_text("x")
    assert run("--renew") == 1
    assert "this is no certificate of a host" in capsys.readouterr().err


def test_without_the_library_its_package_is_named(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "migrate.cli.authority", None)
    assert run("host1", "host2") == 1
    assert "apt install python3-cryptography" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["host-1.example", "a" * 63, "10.0.0.1", "FD00::1", " host1 "])
def test_names_and_addresses_are_accepted(text: str) -> None:
    assert checked_name(text) == text.strip().lower()


@pytest.mark.parametrize("text", ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"])
def test_an_address_of_no_single_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the address of no single host"):
        checked_name(text)


def test_what_an_interrupted_command_has_left_is_completed(run: Run) -> None:
    """A full disk ends the command between any two files."""
    made = Path("xen-postcopy-init")
    assert run("host1", "host2") == 0
    whole = sorted(contents())
    for file in whole:
        (made / "authority/authority.pem").unlink(missing_ok=True)
        for certificate in made.glob("hosts/*/host.pem"):
            certificate.unlink()
        file.unlink(missing_ok=True)
        assert run("host1", "host2") == 0
        assert sorted(contents()) == whole
        authority = Authority.load(
            (made / "authority/authority.pem").read_bytes(),
            (made / "authority/authority.key").read_bytes(),
        )
        for name in ("host1", "host2"):
            assert (host(name) / "authority.pem").read_bytes() == authority.certificate()


def test_two_commands_at_once_have_one_authority(run: Run) -> None:
    words = [sys.executable, "-m", "migrate.cli", "init", "--directory", "both"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    started = [
        subprocess.Popen([*words, *hosts], stdout=subprocess.DEVNULL, env=environment)
        for hosts in (("a", "b"), ("c", "d"), ("e", "f"))
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    kept = Path("both/authority/authority.pem").read_bytes()
    for name in "abcdef":
        assert (host(name, "both") / "authority.pem").read_bytes() == kept
