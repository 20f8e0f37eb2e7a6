# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics for Prometheus and its kin: what is counted, and how it is given away."""
