# SPDX-License-Identifier: GPL-2.0-or-later
"""The hypervisor with memory paging: the patch of each release, and how Debian's source package
becomes a hypervisor, for the lab and as a package.
"""
