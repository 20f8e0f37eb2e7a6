# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks before the guest is touched: the domain is free, and the destination accepts it."""

from __future__ import annotations

import functools
import math

import trio

from migrate.errors import MigrationError, OccupiedError, RemoteProtocolError
from migrate.lanes.connection import step_timeout
from migrate.options import MigrationOptions
from migrate.protocol import messages as m
from migrate.protocol.pfns import sparseness
from sender.context import Context, Source
from sender.ownership import Link
from sender.push import PushLane
from xenbackend.contract import Domain, DomainState
from xenbackend.pages import PAGE_SIZE


def check_state(domain: Domain) -> None:
    """Raises :class:`MigrationError` for a domain that cannot be migrated in its present state.
    Raises :class:`OccupiedError` if another migration or another program uses the domain.

    Log-dirty is not looked at: Xen can only be asked by an attempt to switch it on.
    """
    info = domain.info()
    if info.paged_pages or domain.has_pager():
        raise OccupiedError(
            f"{info.name} has a pager, and {info.paged_pages} of its pages are not here: wait "
            "until the migration that brings them is completed, which `xen-postcopy list` shows"
        )
    if info.state is DomainState.SUSPENDED:
        raise OccupiedError(
            f"{info.name} is suspended: only a running guest can be migrated; `xen-postcopy list` "
            "may show what migrates or saves it now"
        )
    if info.state is not DomainState.RUNNING:
        raise MigrationError(
            f"{info.name} is {info.state.value}: only a running guest can be migrated"
        )


def check_free(domain: Domain, options: MigrationOptions) -> None:
    """Raises as :func:`check_state`, and :class:`OccupiedError` if log-dirty is on."""
    check_state(domain)
    if domain.log_dirty_is_on():
        if not options.take_log_dirty:
            raise log_dirty_is_used(domain.info().name)
        domain.log_dirty_disable()


def log_dirty_is_used(name: str) -> OccupiedError:
    return OccupiedError(
        f"log-dirty is on for {name}: a program migrates, saves or protects it, or was killed "
        "when doing so; if none does any more, the option --take-log-dirty of `migrate`, "
        "`estimate` or `evacuate` (or the variable XEN_POSTCOPY=off for `xl migrate`) switches it "
        "off first"
    )


def check_devices(domain: Domain, name: str) -> None:
    """Raises :class:`MigrationError` for a domain with devices.  Without a toolstack the guest
    would have none of them at the destination, and what a device model writes to the guest's memory
    would not be recorded.
    """
    if devices := domain.devices():
        raise MigrationError(
            f"{name} has devices that only its toolstack can move ({', '.join(devices)}): use "
            "`xl migrate` with our helper (docs/xl.md), or detach them"
        )


async def agree(context: Context, source: Source) -> PushLane:
    """Check the domain, connect, and offer the guest.  When this returns, both lanes are there.

    Raises :class:`MigrationError` if the destination refuses the guest.
    """
    domain = source.domain
    info = await trio.to_thread.run_sync(domain.info)
    context.is_domain(domain, info.name)
    await trio.to_thread.run_sync(functools.partial(check_free, domain, context.options))
    if not context.toolstack.moves_devices:
        await trio.to_thread.run_sync(check_devices, domain, info.name)
    context.statistics.memory_bytes = info.tot_pages * PAGE_SIZE
    push = context.take_push_lane(await context.lanes.push(), domain)
    context.ownership.link = Link.UP
    token = await _offer(context, domain, push)
    context.pull = await context.lanes.pull(token)
    context.lanes.keep(context.entry.key)
    await context.toolstack.agreed()
    return push


async def _offer(context: Context, domain: Domain, push: PushLane) -> bytes:
    """Offer the guest to the destination.  Returns the token for the pull lane."""
    config = await trio.to_thread.run_sync(domain.config)
    if problem := sparseness(config.nr_pfns, config.max_pages):
        raise MigrationError(problem)
    await push.send(
        m.Offer(
            config.name,
            config.nr_pfns,
            config.max_pages,
            config.vcpus,
            config.platform,
            context.options.strategy.pages_after_handover,
            context.entry.key,
            math.ceil((context.options.checkpoint_every_s or 0) * 1000),
        )
    )
    with step_timeout("the destination did not answer the preflight"):
        answer = await push.receive()
    if isinstance(answer, m.Refused | m.Failed):
        raise MigrationError(f"the destination refuses: {answer.reason}")
    if not isinstance(answer, m.Accepted):
        raise RemoteProtocolError(f"{answer.type} instead of accepted or refused")
    return answer.token
