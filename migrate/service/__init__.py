# SPDX-License-Identifier: GPL-2.0-or-later
"""What both daemons have in common: start and end, configuration, journal."""
