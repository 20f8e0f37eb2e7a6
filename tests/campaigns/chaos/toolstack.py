# SPDX-License-Identifier: GPL-2.0-or-later
"""``xl migrate`` as two processes that may be killed: its halves, which follow docs/xl.md.

Each half starts a helper and waits for the helper's end.  Then the halves agree: the destination
sends ``ready``, the source ``go``, and the destination ``report``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.libxl import Libxl
from tests.support.xl import Xl
from xenbackend.contract import DomainState
from xenbackend.errors import XenError

AWAY = "--migratedaway"
"""xl appends this to the name of a source that it may have given away."""
TIMEOUT_S = 90.0


class KilledError(Exception):
    """This half of xl was killed."""


class Stream:
    """The connection of the two halves."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sent: set[str] = set()
        self._is_open = True

    def send(self, word: str) -> None:
        with self._changed:
            if self._is_open:
                self._sent.add(word)
                self._changed.notify_all()

    def receive(self, word: str) -> bool:
        """Wait for a word.  Returns false if the stream was closed before the word was sent."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: word in self._sent or not self._is_open, TIMEOUT_S
            ), word
            return word in self._sent

    def close(self) -> None:
        """Close the stream.  What was sent can still be received."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def cut(self) -> None:
        """Close the stream.  What was not received is lost."""
        with self._changed:
            self._sent.clear()
            self._is_open = False
            self._changed.notify_all()


@dataclass
class Pauses:
    """How long xl takes before it does something, in seconds."""

    start: float
    destroy: float
    leaves_paused: bool = False
    """``xl migrate -p``."""


@dataclass
class Half:
    """One half of xl, with its helper."""

    helper: Libxl
    stream: Stream
    migrate: Callable[[Half], None]
    killed: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def begin(self) -> None:
        self.helper.start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.migrate(self)
        except KilledError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.stream.close()
            self.helper.kill()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def kill(self) -> None:
        self.killed.set()
        self.stream.close()
        self.helper.kill_xl()
        self._thread.join(TIMEOUT_S)

    def has_helper_succeeded(self) -> bool:
        succeeded = self.helper.wait() == 0 and self.helper.result == (0, 0)
        self.check_alive()
        return succeeded

    def check_alive(self, after_s: float = 0.0) -> None:
        """Raises :class:`KilledError`."""
        if self.killed.wait(after_s):
            raise KilledError

    def receive(self, word: str) -> bool:
        received = self.stream.receive(word)
        self.check_alive()
        return received


class XlMigrate:
    """One ``xl migrate``.  ``restored`` and ``decided`` are set when xl has reached that."""

    def __init__(self, xl: Xl, pauses: Pauses):
        self._xl, self._pauses = xl, pauses
        stream = Stream()
        self.stream = stream
        self.source = Half(xl.save, stream, self._migrate_source)
        self.destination = Half(xl.restore, stream, self._migrate_destination)
        self.restored, self.decided = threading.Event(), threading.Event()
        self.put = ""
        """The end at which xl has let the guest run, or which alone has it, paused."""

    def begin(self) -> None:
        self.destination.begin()
        self.source.begin()

    @property
    def is_over(self) -> bool:
        """Whether both halves have ended.  Raises what has ended one of them wrongly."""
        for half in (self.source, self.destination):
            if half.is_over and half.error is not None:
                raise half.error
        return self.source.is_over and self.destination.is_over

    def end(self) -> None:
        for half in (self.source, self.destination):
            half.kill()

    def _migrate_source(self, half: Half) -> None:
        if not half.has_helper_succeeded() or not half.receive("ready"):
            self._resume()
            return
        self._xl.source.rename(self._xl.spec.name + AWAY)
        half.check_alive()
        half.stream.send("go")
        if not half.receive("report"):
            return  # "Domain state is now undefined"
        half.check_alive(self._pauses.destroy)
        with contextlib.suppress(XenError):
            self._xl.source.destroy()
        self.put = "destination"

    def _resume(self) -> None:
        """Resume the guest, unless the sender or an administrator has done so."""
        with contextlib.suppress(XenError):
            if self._xl.source.state() is DomainState.SUSPENDED:
                self._xl.source.resume()
        self.put = "source"
        self.decided.set()

    def _migrate_destination(self, half: Half) -> None:
        if not half.has_helper_succeeded():
            self._destroy()
            return
        self.restored.set()
        half.check_alive(self._pauses.start)
        half.stream.send("ready")
        if not half.receive("go"):
            self._destroy()
            return
        if not self._pauses.leaves_paused:
            with contextlib.suppress(XenError):
                self._xl.destination.start()
            self.put = "destination"
        self.decided.set()
        half.check_alive()
        half.stream.send("report")

    def _destroy(self) -> None:
        with contextlib.suppress(XenError):
            self._xl.destination.destroy()
