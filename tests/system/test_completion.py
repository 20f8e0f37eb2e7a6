# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of ``completion/`` as each shell loads them, from where a wheel installs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import WAIT_S
from tests.tree.listing import TREE

BASH = """\
source SHARE/bash-completion/completions/xen-postcopy
complete -p xen-postcopy
COMP_WORDS=(xen-postcopy pre) COMP_CWORD=1
_xen_postcopy_completion xen-postcopy pre xen-postcopy
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = """\
set fish_complete_path SHARE/fish/vendor_completions.d
complete --do-complete 'xen-postcopy pre'
"""
ZSH = """\
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1=; PS2=; fpath=(SHARE/zsh/site-functions $fpath); autoload -U compinit'
zpty -w shell 'compinit -u -D; print $_comps[xen-postcopy] is loaded'
zpty -r shell before '*_xen-postcopy is loaded*'
zpty -w -n shell $'xen-postcopy pre\\t'
zpty -r shell line '*xen-postcopy preflight*'
print -r -- $line
"""
"""zsh completes only what is typed at a terminal."""


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``share`` of an installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    clone = folder / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "setup.py", "completion", "migrate", "xenbackend"):
        (clone / name).symlink_to(TREE / name)
    command = [sys.executable, "setup.py", "--quiet", "install_data", "--install-dir", str(folder)]
    done = subprocess.run(command, cwd=clone, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "share"


@pytest.mark.parametrize(
    ("shell", "text"),
    [(["bash", "--norc"], BASH), (["zsh", "-f"], ZSH), (["fish", "--no-config"], FISH)],
    ids=["bash", "zsh", "fish"],
)
def test_a_shell_loads_its_file_and_completes_a_command(
    shell: list[str], text: str, share: Path, tmp_path: Path
) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"there is no {shell[0]}")
    program = tmp_path / "bin/xen-postcopy"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -P\nfrom migrate.cli import main\nmain()\n")
    program.chmod(0o755)
    environment = {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(TREE),
        "HOME": str(tmp_path),
        "TERM": "dumb",
    }
    done = subprocess.run(
        [*shell, "-c", text.replace("SHARE", str(share))],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "preflight" in done.stdout
