# SPDX-License-Identifier: GPL-2.0-or-later
"""The Xen for which the program was built, and the Xen on which it runs: ``--version``, and what
happens if they differ.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from migrate.cli import main, restart
from xenbackend import release
from xenbackend.choose import open_hypervisor
from xenbackend.errors import XenError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NATIVE", "RUNNING"):
        monkeypatch.setattr(release, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()


def run_on(version: tuple[str, str, str], kind: str = "xen") -> None:
    (release.RUNNING / "version").mkdir()
    (release.RUNNING / "type").write_text(f"{kind}\n")
    for name, part in zip(("major", "minor", "extra"), version, strict=True):
        (release.RUNNING / "version" / name).write_text(f"{part}\n")


def build_for(xen: str) -> None:
    module = release.NATIVE / "_xen.cpython-313-x86_64-linux-gnu.so"
    libraries = f"libxencall.so.1\0libxenctrl.so.{xen}\0libxenguest.so.{xen}\0"
    module.write_bytes(b"\x7fELF\0" + libraries.encode())


def test_the_libraries_are_named_as_the_module_needs_them() -> None:
    build_for("4.20")
    assert release.built_for() == "4.20"
    run_on(("4", "17", ".5"))
    assert release.in_words() == "built for Xen 4.20; this host runs Xen 4.17.5"


def test_a_program_without_its_native_module_is_called_so() -> None:
    assert release.in_words() == "built without Xen's libraries; this host runs no Xen"


def test_another_hypervisor_is_no_xen() -> None:
    run_on(("1", "0", ""), kind="other")
    assert release.running() == ""


@pytest.mark.parametrize("runs", [("4", "20", ".4"), ("4", "20", "-rc"), ("4", "20", "")])
def test_any_update_of_the_release_fits(runs: tuple[str, str, str]) -> None:
    build_for("4.20")
    run_on(runs)
    assert release.mismatch() == ""


def test_without_one_of_the_two_nothing_is_claimed() -> None:
    run_on(("4", "17", ".5"))
    assert release.mismatch() == ""
    build_for("4.20")
    assert release.mismatch() != ""
    (release.RUNNING / "type").unlink()
    assert release.mismatch() == ""


@pytest.mark.parametrize("runs", [("4", "17", ".5"), ("4", "2", ".0"), ("5", "20", "")])
def test_the_xen_of_another_release_is_not_opened(runs: tuple[str, str, str]) -> None:
    """As between the upgrade of a host to the next release of Debian and its restart."""
    build_for("4.20")
    run_on(runs)
    with pytest.raises(XenError, match="and this host runs Xen") as info:
        open_hypervisor(None)
    assert info.value.errno == errno.EACCES


@pytest.mark.parametrize(
    "command",
    [
        ["preflight"],
        *([end, "--socket", "s", "--state", "state"] for end in ("sender", "receiver")),
    ],
    ids=lambda command: command[0],
)
def test_the_commands_name_both_releases_in_one_line(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build_for("4.20")
    run_on(("4", "17", ".5"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["xen-postcopy", *command])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "built for Xen 4.20, and this host runs Xen 4.17.5: restart the host" in told.err


def test_a_daemon_that_works_is_not_restarted_for_another_xen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def systemctl(*arguments: str) -> int:
        raise AssertionError(f"systemctl {arguments}")

    monkeypatch.setattr(restart, "_systemctl", systemctl)
    build_for("4.20")
    run_on(("4", "17", ".5"))
    restart.restart_idle_command.main([], standalone_mode=False)
    told = capsys.readouterr().out
    assert "no daemon was restarted" in told and "restart the host with Xen 4.20" in told
    restart.restart_idle_command.main(["--json"], standalone_mode=False)
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [one.pop("unit") for one in found] == [*restart.DAEMONS]
    assert all("restart the host with Xen 4.20" in one.pop("problem") for one in found)
    assert found == [{"restarted": False, "guests": []}] * 2
