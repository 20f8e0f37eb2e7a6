# SPDX-License-Identifier: GPL-2.0-or-later
"""The flags with which the C code of all native modules is compiled.

Their build files load this file by its path, because setuptools runs them without the project
on the path of imports.
"""

FLAGS = ["-O2", "-std=gnu11", "-Wall", "-Wextra"]
