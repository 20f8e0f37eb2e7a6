# SPDX-License-Identifier: GPL-2.0-or-later
"""The class of a hypervisor's error follows its number."""

from __future__ import annotations

import errno

from xenbackend.errors import NoSuchDomainError, XenError, no_such_domain


def test_a_call_that_finds_no_domain_raises_the_error_of_no_domain() -> None:
    error = XenError("mem_paging_disable", errno.ESRCH, pfn=3, done=2)
    assert type(error) is NoSuchDomainError
    assert (error.errno, error.pfn, error.done) == (errno.ESRCH, 3, 2)
    assert "mem_paging_disable at pfn 0x3" in str(error)


def test_another_number_stays_an_error_of_the_hypervisor() -> None:
    assert type(XenError("mem_paging_disable", errno.EBUSY)) is XenError


def test_a_domain_that_is_not_found_is_named() -> None:
    assert str(no_such_domain("web")) == "domain 'web': there is no such domain on this host"
    assert "another domain has this number" in str(
        no_such_domain(5, "another domain has this number now")
    )
