# SPDX-License-Identifier: GPL-2.0-or-later
"""What the two ends say to each other: frames, messages, sets of pfns, and the session.  Sans-IO."""
