# SPDX-License-Identifier: GPL-2.0-or-later
"""``report``: one migration as a document with pictures."""
