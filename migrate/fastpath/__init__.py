# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path of a fault, in C, and its interface for Python."""
