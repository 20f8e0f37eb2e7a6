# SPDX-License-Identifier: GPL-2.0-or-later
"""A migration whose sender is in one of the states, with a guest that is there."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from migrate.cli.world import World, wait_for_steps
from migrate.options import MigrationOptions, Strategy
from migrate.service.journal import Journal
from sender.backlog import Backlog
from sender.context import Context, Source
from sender.dirty import DirtyLog
from sender.entry import Entry
from sender.ownership import State
from sender.recovery import Recovery
from sender.rollback import Rollback
from sender.toolstack import OwnToolstack, XlToolstack
from tests.support.guests import busy
from tests.support.left import SESSION, NoLanes


def in_state(world: World, name: str, state: State, *, xl: bool) -> tuple[Rollback, Context]:
    """Return what acts on an error of a migration whose sender is in ``state``."""
    guest = world.source.create_guest(busy(name).to_bytes())
    wait_for_steps(guest, 20)
    domain = world.source.open(guest.domid)
    if state not in (State.OFFERING, State.COPYING):
        domain.suspend()
    tools = XlToolstack(name, world.directory / "keeper") if xl else OwnToolstack()
    entry = Entry(domain.info().id, MigrationOptions(Strategy.POSTCOPY), tools.destroys_source)
    journal = Journal(world.directory / "journal")
    lanes = cast(Any, NoLanes())
    context = Context(SESSION, world.source, lanes, journal, tools, entry, state)
    context.backlog = Backlog(np.ones(domain.nr_pfns, dtype=np.bool_))
    dirty_log = DirtyLog(domain, domain.nr_pfns, enabled=False)
    source = context.source = Source(domain, dirty_log, None)
    return Rollback(context, source, Recovery(context, source)), context
