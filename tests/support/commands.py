# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of the command line."""

from __future__ import annotations

import sys

PROGRAM = [sys.executable, "-m", "migrate.cli"]
