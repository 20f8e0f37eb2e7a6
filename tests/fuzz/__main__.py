# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of what a peer may send: ``python -m tests.fuzz --seconds 60``, or ``make fuzz``.

An input is a point in the course of a session, an end, and frames for it.  Whatever they are: the codec gives messages or says
what is wrong (``RemoteProtocolError``), the session machine takes them or says so, and neither takes more memory than the
limits allow.  Anything else is a crash, and is kept as ``crash-...`` in the current folder.

The corpus is what found new code: ``--minimize`` keeps the smallest set of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
MAX_INPUT = 4096
PIECE_S = 600
"""Then a new process goes on: atheris keeps each number that it has seen compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--minimize", action="store_true", help="keep in the corpus only what reaches code of its own")
    options = parser.parse_args()
    CORPUS.mkdir(exist_ok=True)
    target = [sys.executable, "-m", "tests.fuzz.target"]
    limits = [f"-max_len={MAX_INPUT}", "-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1"]
    with tempfile.TemporaryDirectory() as folder:
        if options.minimize:
            commands = [[*target, "-merge=1", folder, str(CORPUS)]]
        else:
            pieces = [min(PIECE_S, options.seconds - at) for at in range(0, options.seconds, PIECE_S)]
            commands = [[*target, *limits, f"-max_total_time={piece}", folder, str(CORPUS)] for piece in pieces]
        for command in commands:
            status = subprocess.run(command, check=False).returncode
            if status:
                sys.exit(status)
        found = sorted(Path(folder).iterdir())
        if options.minimize and not found:
            sys.exit("fuzz: nothing came of it; the corpus is as it was")
        if options.minimize:
            for old in CORPUS.iterdir():
                old.unlink()
        if options.minimize or os.environ.get("KEEP_CORPUS"):
            for path in found:
                (CORPUS / path.name).write_bytes(path.read_bytes())
        print(f"fuzz: {len(found)} inputs beyond the corpus of {len(list(CORPUS.iterdir()))}")


if __name__ == "__main__":
    main()
