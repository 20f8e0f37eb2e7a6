# SPDX-License-Identifier: GPL-2.0-or-later
"""``--version``: the Xen for which the program was built, and the Xen on which it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from xenbackend import release


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


def test_the_libraries_are_named_as_the_module_needs_them() -> None:
    module = release.NATIVE / "_xen.cpython-313-x86_64-linux-gnu.so"
    module.write_bytes(b"\x7fELF\0libxencall.so.1\0libxenctrl.so.4.20\0libxenguest.so.4.20\0")
    assert release.built_for() == "4.20"
    run_on(("4", "17", ".5"))
    assert release.in_words() == "built for Xen 4.20; this host runs Xen 4.17.5"


def test_a_program_without_its_native_module_is_called_so() -> None:
    assert release.in_words() == "built without Xen's libraries; this host runs no Xen"


def test_another_hypervisor_is_no_xen() -> None:
    run_on(("1", "0", ""), kind="other")
    assert release.running() == ""
