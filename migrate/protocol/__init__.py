# SPDX-License-Identifier: GPL-2.0-or-later
"""The protocol between the two ends: frames, messages, sets of pfns, and the session.  Sans-IO."""
