# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon at the destination: restores the guest, evicts pages, and is the guest's pager."""
