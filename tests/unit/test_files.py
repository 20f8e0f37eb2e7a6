# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are made where somebody else may have put something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrate.service.files import create_anew


def written(path: Path) -> bytes:
    with open(create_anew(path), "wb") as file:
        file.write(b"ours")
    return path.read_bytes()


def test_a_file_is_not_made_through_a_link(tmp_path: Path) -> None:
    other, new = tmp_path / "other", tmp_path / "file.new"
    other.write_bytes(b"theirs")
    new.symlink_to(other)
    assert written(new) == b"ours" and not new.is_symlink()
    assert other.read_bytes() == b"theirs"


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file.new")
    assert written(tmp_path / "file.new") == b"ours"


def test_what_a_killed_daemon_has_left_is_replaced_and_not_shared(tmp_path: Path) -> None:
    new, kept = tmp_path / "file.new", tmp_path / "kept"
    new.write_bytes(b"of a killed daemon, and longer")
    new.chmod(0o666)
    kept.hardlink_to(new)
    assert written(new) == b"ours" and new.stat().st_mode & 0o777 == 0o600
    assert kept.read_bytes() == b"of a killed daemon, and longer"


def test_a_folder_is_left_and_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file.new").mkdir()
    with pytest.raises(OSError, match=r"file\.new"):
        create_anew(tmp_path / "file.new")
