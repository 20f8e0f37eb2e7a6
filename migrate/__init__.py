# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends of a migration share: protocol, policy, transport, statistics, command line."""

__version__ = "0.1.0"
