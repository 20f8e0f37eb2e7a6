# SPDX-License-Identifier: GPL-2.0-or-later
"""The domain that a person means."""

from __future__ import annotations

import errno
import uuid

from xenbackend.contract import DomainInfo
from xenbackend.errors import XenError, no_such_domain


def find_domain(domains: list[DomainInfo], text: str) -> DomainInfo:
    """Return the domain that a person means by a number, a name or a UUID.  Called once for each
    request.

    A text of digits is a number, as in xl.  Raises ``XenError``: ESRCH if there is no such domain,
    EEXIST if the text fits more than one domain.
    """
    named = [info for info in domains if info.name == text and text]
    if text.isascii() and text.isdigit():
        numbered = [info for info in domains if str(info.domid) == text]
        others = [info for info in named if info not in numbered]
        if others:
            fits = " and ".join(
                [f"the number of {info.name!r}" for info in numbered]
                + [_as_a_name(i) for i in others]
            )
            why = f"that is {fits}: use a name, number or UUID that fits one domain only"
            raise XenError(f"domain {text!r}", errno.EEXIST, why=why, is_call=False)
        named = numbered
    if not named:
        named = [info for info in domains if str(uuid.UUID(bytes=info.handle)) == text.lower()]
    if not named:
        raise no_such_domain(text)
    if len(named) > 1:
        numbers = ", ".join(str(info.domid) for info in named)
        why = f"there is more than one such domain: name it by one of these numbers: {numbers}"
        raise XenError(f"domain {text!r}", errno.EEXIST, why=why, is_call=False)
    return named[0]


def _as_a_name(info: DomainInfo) -> str:
    handle = uuid.UUID(bytes=info.handle)
    return f"the name of the domain with the number {info.domid} and the UUID {handle}"
