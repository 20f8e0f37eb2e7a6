# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of both ends as tasks of one process, on simulated hosts."""
