# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of daemons and commands as processes of their own."""
