# SPDX-License-Identifier: GPL-2.0-or-later
"""What a daemon is: its start and its end, its configuration, its journal."""
