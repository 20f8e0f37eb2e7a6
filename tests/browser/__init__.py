# SPDX-License-Identifier: GPL-2.0-or-later
"""What a real browser shows: ``make browser``.  ``make test`` does not need a browser."""
