"""Unmodified xl with our helper: run in dom0 by ``make xenlab``.  Migrations are from dom0 to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xenlab.dom0.guests import Guest, guest, xl

pytestmark = pytest.mark.hypervisors("debian")
TREE = Path(__file__).parents[3]


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    program = tmp_path / "xen-postcopy-xl-helper"
    program.write_text(f'#!/bin/sh\ncd {TREE} && exec {sys.executable} -m migrate.xl.helper "$@"\n')
    program.chmod(0o755)
    return program


def migrate(name: str, helper: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["xl", "migrate", "-s", "", name, "xl migrate-receive"], check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, "LIBXL_SAVE_HELPER": str(helper), **environment},
    )  # fmt: skip


def test_the_stock_helper_does_what_ours_leaves_to_it(helper: Path, tmp_path: Path) -> None:
    with guest("xl1") as made:
        made.wait_for_heartbeats(2)
        told = migrate("xl1", helper, XEN_POSTCOPY="require")
        assert told.returncode != 0 and "XEN_POSTCOPY=require" in told.stderr
        assert int(xl("domid", "xl1")) == made.domid
        made.wait_for_heartbeats(2)
        told = migrate("xl1", helper)
        assert told.returncode == 0, told.stderr
        assert "using Xen's own live migration" in told.stderr
        assert "Migration successful" in told.stderr
        domid = int(xl("domid", "xl1"))
        assert domid != made.domid
        saved = tmp_path / "saved"
        arrived = Guest("xl1--incoming", domid)  # as its console was named when it was opened
        beats = arrived.wait_for_heartbeats(3)
        assert [beat.errors for beat in beats] == [0] * len(beats)
        environment = {**os.environ, "LIBXL_SAVE_HELPER": str(helper), "XEN_POSTCOPY": "require"}
        for command in (["xl", "save", "xl1", str(saved)], ["xl", "restore", str(saved)]):
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
            assert done.returncode == 0, done.stderr
        made.wait_for_heartbeats(2)
