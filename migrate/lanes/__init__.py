# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections between the two ends: dialling, accepting, TLS, bulk transfer."""
