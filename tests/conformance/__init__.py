# SPDX-License-Identifier: GPL-2.0-or-later
"""What every backend must do.  The tests run on the simulated host and on a real Xen."""
