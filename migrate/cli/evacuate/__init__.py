# SPDX-License-Identifier: GPL-2.0-or-later
"""``evacuate``: all guests of a host, or some, to other hosts."""
