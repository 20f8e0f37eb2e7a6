# SPDX-License-Identifier: GPL-2.0-or-later
"""The helpers that several tests use."""
