# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends of a migration share: protocol, lanes, fast path, service, command line."""

__version__ = "0.2.0"
