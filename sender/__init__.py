# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon at the source: precopy, switchover, and then the missing pages."""
