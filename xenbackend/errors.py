# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors of a hypervisor.  This module imports no numpy, because a command of the command line
has to start fast.
"""

from __future__ import annotations

import errno as errno_module
import os


class XenError(Exception):
    """A hypercall failed.

    ``errno`` is Xen's; ``pfn`` the one it failed at, if any; ``done`` how many pfns of the batch,
    from its start, were handled before.  With ESRCH the error is a :class:`NoSuchDomainError`,
    whichever call failed: the class follows the number, as that of an ``OSError`` does.
    """

    def __new__(cls, _operation: str, errno: int, **_more: object) -> XenError:
        return super().__new__(
            NoSuchDomainError if cls is XenError and errno == errno_module.ESRCH else cls
        )

    def __init__(
        self, operation: str, errno: int, *, pfn: int | None = None, done: int = 0, why: str = ""
    ):
        self.operation = operation
        self.errno = errno
        self.pfn = pfn
        self.done = done
        self.why = why or os.strerror(errno)
        name = errno_module.errorcode.get(errno, str(errno))
        where = f" at pfn {pfn:#x}" if pfn is not None else ""
        super().__init__(f"{operation}{where}: {self.why} ({name})")


class GuestOptionError(ValueError):
    """An option of a simulated guest that makes no sense; the text says which and why."""


class NoSuchDomainError(XenError):
    """The domain has been destroyed, or was never there; ``errno`` is ESRCH."""


def no_such_domain(
    domain: str | int, why: str = "there is no such domain on this host"
) -> XenError:
    """The error of a domain, by its name or its domid, that is not found."""
    return XenError(f"domain {domain!r}", errno_module.ESRCH, why=why)


def check_handle(domid: int, found: bytes, expected: bytes | None) -> None:
    """Raises :class:`NoSuchDomainError` if the domain with this number has another handle than
    expected.
    """
    if expected is not None and found != expected:
        raise no_such_domain(
            domid, "another domain has this number now; the one that was meant is gone"
        )
