# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the tree and of the tests' own machinery."""
