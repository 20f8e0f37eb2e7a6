# SPDX-License-Identifier: GPL-2.0-or-later
"""What every backend must do; run on the simulated host and on a real Xen."""
