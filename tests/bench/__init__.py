# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures, set against plain C programs on the same machine in the same run: ``make bench``."""
