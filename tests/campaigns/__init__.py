# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that search for faults: at random, at length, or through every state."""
