# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: requests of operators and of the helper under xl."""
