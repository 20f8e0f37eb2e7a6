# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of what a peer may send and a ring may hold: ``make fuzz``.

Half of the time is for the codec and the session machine in Python (``target.py``).  An input of
this target is a point in the course of a session, an end, and frames for it.  Whatever they are,
the codec gives messages or an error that names what is wrong (``RemoteProtocolError``), and the
session machine accepts them or raises such an error.  Neither uses more memory than the limits
allow.

The other half is for the native modules (``native/*.c``), in equal parts.  Whatever their inputs
are, they access no memory but their own, and do nothing that C leaves undefined.

Anything else is a crash.  Its input is kept in ``build/fuzz`` under the target's name.

A target's corpus is what found new code: ``--minimize`` keeps the smallest set of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.campaigns.fuzz.native import build

CORPUS = Path(__file__).with_name("corpus")
KEPT = Path(__file__).resolve().parents[3] / "build/fuzz"
MAX_INPUT = 4096
PIECE_S = 600
"""After this time a new process continues, because atheris keeps each number that it has
compared.
"""


def fuzz(name: str, target: list[str], corpus: Path, seconds: int, *, minimize: bool) -> None:
    """Run a target.  Ends this process if an input ends the target's process."""
    corpus.mkdir(parents=True, exist_ok=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    limits = [
        f"-max_len={MAX_INPUT}",
        "-rss_limit_mb=1024",
        "-timeout=10",
        f"-artifact_prefix={KEPT}/{name}-",
    ]
    with tempfile.TemporaryDirectory() as folder:
        if minimize:
            commands = [[*target, "-merge=1", folder, str(corpus)]]
        else:
            pieces = [min(PIECE_S, seconds - at) for at in range(0, seconds, PIECE_S)]
            commands = [
                [
                    *target,
                    *limits,
                    "-print_final_stats=1",
                    f"-max_total_time={piece}",
                    folder,
                    str(corpus),
                ]
                for piece in pieces
            ]
        for command in commands:
            status = subprocess.run(command, check=False).returncode
            if status:
                sys.exit(f"fuzz: {name} ended with status {status}; its input is in {KEPT}")
        found = sorted(Path(folder).iterdir())
        if minimize and not found:
            sys.exit(f"fuzz: nothing came of {name}; its corpus is as it was")
        if minimize:
            for old in corpus.iterdir():
                old.unlink()
        if minimize or os.environ.get("KEEP_CORPUS"):
            for path in found:
                (corpus / path.name).write_bytes(path.read_bytes())
        print(
            f"fuzz: {name}: {len(found)} inputs beyond the corpus of {len(list(corpus.iterdir()))}",
            flush=True,
        )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--minimize",
        action="store_true",
        help="keep in each corpus only what reaches code of its own",
    )
    options = parser.parse_args()
    programs = build.build()
    targets = {name: ([str(program)], build.CORPUS / name) for name, program in programs.items()}
    each = max(1, options.seconds // 2 // len(targets))
    for name, (target, corpus) in targets.items():
        fuzz(name, target, corpus, each, minimize=options.minimize)
    rest = max(1, options.seconds - each * len(targets))
    fuzz(
        "session",
        [sys.executable, "-m", "tests.campaigns.fuzz.target"],
        CORPUS,
        rest,
        minimize=options.minimize,
    )


if __name__ == "__main__":
    main()
