# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path of a fault, in C, and what Python asks of the fast path."""
