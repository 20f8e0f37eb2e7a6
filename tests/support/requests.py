# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests of the paging ring."""

from __future__ import annotations

from xenbackend.ring import MEM_PAGING_DROP_PAGE, PagingRequest


def request(pfn: int, vcpu: int = 0, flags: int = 0) -> PagingRequest:
    return PagingRequest(pfn, vcpu, 0 if flags & MEM_PAGING_DROP_PAGE else 1, flags, 10)
