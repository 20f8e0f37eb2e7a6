# SPDX-License-Identifier: GPL-2.0-or-later
"""The check that no call that may block is made in the event loop's thread
(``tests/support/event_loop.py``) notices one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from migrate.service.config import SenderConfig, advertised, load
from sender.toolstack import _resume
from tests.conftest import Boot
from tests.support.event_loop import AUDITS, BlockingCallError


async def test_a_hypercall_in_the_event_loop_is_noticed(boot: Boot) -> None:
    _spec, domain = boot()
    with pytest.raises(
        BlockingCallError, match=r"SimulatedDomain.state in the event loop, by .*toolstack.py"
    ):
        _resume(domain)
    await trio.to_thread.run_sync(_resume, domain)
    domain.state()  # a test may make the call


@pytest.mark.skipif(not AUDITS, reason="coverage is measured")
async def test_a_file_or_a_name_that_is_looked_up_in_the_event_loop_is_noticed(
    tmp_path: Path,
) -> None:
    everywhere = SenderConfig(listen=("0.0.0.0", 1))
    with pytest.raises(BlockingCallError, match=r"socket\.gethostby"):
        advertised(everywhere, 1)
    assert (await trio.to_thread.run_sync(advertised, everywhere, 1))[1] == 1
    with pytest.raises(BlockingCallError, match=r"open .*config.toml"):
        load(tmp_path / "config.toml")
