# SPDX-License-Identifier: GPL-2.0-or-later
# fish loads this file at the first Tab behind `xen-postcopy`.  The program prints the functions
# itself, as the installed version of click has them.
_XEN_POSTCOPY_COMPLETE=fish_source xen-postcopy | source
