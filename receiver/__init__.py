# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon at the destination: restores, evicts, and is the guest's pager until nothing is missing."""
