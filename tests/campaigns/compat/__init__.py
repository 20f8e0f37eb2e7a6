# SPDX-License-Identifier: GPL-2.0-or-later
"""Migrations between an earlier release and the one of this tree."""
