# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors of a hypervisor.  This module imports no numpy, because a command of the command line
has to start fast.
"""

from __future__ import annotations

import errno as errno_module
import os

LOG_DIRTY = "log-dirty is on already: a program migrates, saves or protects the guest"


class XenError(Exception):
    """A hypercall failed.

    ``errno`` is Xen's.  ``pfn`` is the pfn at which the call failed, if any.  ``done`` is the
    number of pfns of the batch, from its start, that were handled before.  With ESRCH the error is
    a :class:`NoSuchDomainError`, because the class follows the number, as for an ``OSError``.
    ``is_call``: a call has failed, and the text has the name of the number.
    """

    def __new__(cls, _operation: str, errno: int, **_more: object) -> XenError:
        return super().__new__(
            NoSuchDomainError if cls is XenError and errno == errno_module.ESRCH else cls
        )

    def __init__(
        self,
        operation: str,
        errno: int,
        *,
        pfn: int | None = None,
        done: int = 0,
        why: str = "",
        is_call: bool = True,
    ):
        self.operation = operation
        self.errno = errno
        self.pfn = pfn
        self.done = done
        self.why = why or os.strerror(errno)
        name = f" ({errno_module.errorcode.get(errno, errno)})" if is_call else ""
        where = f" at pfn {pfn:#x}" if pfn is not None else ""
        super().__init__(f"{operation}{where}: {self.why}{name}")


class GuestOptionError(ValueError):
    """An option of a simulated guest is not possible; the text names the option and the reason."""


class NoSuchDomainError(XenError):
    """The domain has been destroyed, or never existed; ``errno`` is ESRCH."""


def no_such_domain(
    domain: str | int, why: str = "there is no such domain on this host"
) -> XenError:
    """Return the error for a domain that is not found by its name or its domid."""
    return XenError(f"domain {domain!r}", errno_module.ESRCH, why=why, is_call=False)


def check_handle(domid: int, found: bytes, expected: bytes | None) -> None:
    """Raises :class:`NoSuchDomainError` if the domain with this number has another handle than
    expected.
    """
    if expected is not None and found != expected:
        raise no_such_domain(
            domid, "another domain has this number now; the one that was meant is gone"
        )
