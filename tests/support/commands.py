# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the command line."""

from __future__ import annotations

import sys

PROGRAM = [sys.executable, "-m", "migrate.cli"]

COMMAND_S = 240.0
"""The limit of a whole command.  A loopback starts five programs, which takes a minute on a machine
that is busy with much other work.
"""
