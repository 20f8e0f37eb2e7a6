# SPDX-License-Identifier: GPL-2.0-or-later
"""Polling in a thread, and its end."""

from __future__ import annotations

import itertools
import threading

import pytest
import trio

from migrate.tasks import poll_in_thread

LONG_S = 1000.0
FAIL_AFTER_S = 60


async def test_it_polls_in_one_thread_until_there_is_a_result() -> None:
    results: list[str | None] = [None, None, "found", "not asked for"]
    threads = set()

    def look() -> str | None:
        threads.add(threading.get_ident())
        return results.pop(0)

    with trio.fail_after(FAIL_AFTER_S):
        assert await poll_in_thread(look, itertools.repeat(0.0)) == "found"
    assert results == ["not asked for"]
    assert len(threads) == 1 and threading.get_ident() not in threads


async def test_a_result_that_is_false_is_one() -> None:
    with trio.fail_after(FAIL_AFTER_S):
        assert await poll_in_thread(lambda: False, itertools.repeat(LONG_S)) is False


async def test_it_can_be_cancelled_in_a_pause() -> None:
    looked = threading.Event()
    with trio.fail_after(FAIL_AFTER_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poll_in_thread, looked.set, itertools.repeat(LONG_S))
            await trio.to_thread.run_sync(looked.wait)
            nursery.cancel_scope.cancel()


async def test_an_error_of_a_look_is_raised() -> None:
    def look() -> None:
        raise KeyError("the domain")

    with trio.fail_after(FAIL_AFTER_S), pytest.raises(KeyError, match="the domain"):
        await poll_in_thread(look, itertools.repeat(LONG_S))
