# SPDX-License-Identifier: GPL-2.0-or-later
"""What an administrator asks of a migration, wherever the request is made: the command line, the
configuration, the control socket.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from migrate.errors import MigrationError
from migrate.units import MAX_SIZE

LEAST_BANDWIDTH = 4096
"""One page a second.  ``PAGE_SIZE`` is not imported, because commands load this module and must not
load numpy.
"""
MAX_CHECKPOINT_MS = 3_600_000
"""The longest time between two checkpoints that a sender may ask for."""
MAX_TIMEOUT_S = 7 * 24 * 3600
"""The longest time limit of precopy."""
NO_CAP = 0
"""A cap of postcopy that is none.  ``None`` is the cap of precopy."""


class Strategy(Enum):
    HYBRID = "hybrid"
    POSTCOPY = "postcopy"
    PRECOPY = "precopy"

    @property
    def pages_after_handover(self) -> bool:
        """The receiver has to be able to page."""
        return self is not Strategy.PRECOPY


class OnTimeout(Enum):
    """What follows when precopy has not ended within its time limit."""

    POSTCOPY = "postcopy"
    CANCEL = "cancel"
    SUSPEND = "suspend"
    """The rest is sent while the guest is suspended, however long that takes."""


class Until(Enum):
    """Until when an option of a running migration has an effect, and can be changed."""

    SWITCHOVER = "the end of precopy"
    END = "the end"


def _changeable(default: Any, until: Until) -> Any:
    """Declare an option that an operator may change while the migration runs."""
    return field(default=default, metadata={"until": until})


@dataclass(frozen=True)
class PolicyOptions:
    max_rounds: int = _changeable(5, Until.SWITCHOVER)
    """Rounds after which precopy ends (libxl's default for xl migrate is 5)."""
    dirty_threshold: int = _changeable(50, Until.SWITCHOVER)
    """If at most so many pages are dirty, they are sent while the guest is suspended (Xen: 50)."""
    downtime_target_ms: float = _changeable(20.0, Until.SWITCHOVER)
    """If the dirty pages can be sent in this time, they are sent while the guest is suspended."""
    timeout_s: float | None = _changeable(None, Until.SWITCHOVER)
    """The time limit of precopy, in which pauses do not count.  ``None``: there is none."""
    on_timeout: OnTimeout = _changeable(OnTimeout.POSTCOPY, Until.SWITCHOVER)
    """What follows at the time limit."""

    @property
    def limit(self) -> str:
        """The time limit in words, for what it has ended."""
        if self.timeout_s is None:
            return "no time limit"
        return f"its time limit of {self.timeout_s:g} s"

    def problems(self) -> str | None:
        if type(self.max_rounds) is not int or not 1 <= self.max_rounds <= 1000:
            return f"--max-rounds {self.max_rounds}: a whole number, 1 to 1000"
        if type(self.dirty_threshold) is not int or self.dirty_threshold < 0:
            return f"--dirty-threshold {self.dirty_threshold}: a whole number, at least 0"
        if not 0 < self.downtime_target_ms <= 3_600_000:
            target = self.downtime_target_ms
            return f"--downtime-target {target}: more than 0 milliseconds, at most an hour"
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            return f"--timeout {self.timeout_s}: more than 0 seconds, at most a week"
        return None


@dataclass(frozen=True)
class MigrationOptions:
    strategy: Strategy = Strategy.HYBRID
    policy: PolicyOptions = PolicyOptions()
    bandwidth_bytes_per_s: float | None = _changeable(None, Until.END)
    """The cap on background copying.  ``None``: there is none."""
    checkpoint_every_s: float | None = None
    """The interval at which the guest's state at the destination is sent back, so that the guest
    survives the loss of the destination.  ``None``: nothing is sent back.
    """
    take_log_dirty: bool = False
    """Use log-dirty even if it is on already: an administrator has found that no other program uses
    it any more.
    """
    postcopy_bandwidth_bytes_per_s: float | None = _changeable(None, Until.END)
    """The cap after the handover.  ``None``: the same one; :data:`NO_CAP`: there is none."""

    def __post_init__(self) -> None:
        """Check the values, because another program than ours may have sent the request.  Raises
        :class:`MigrationError`.
        """
        if problem := self.policy.problems():
            raise MigrationError(problem)
        every_s = self.checkpoint_every_s
        for name in ("bandwidth_bytes_per_s", "postcopy_bandwidth_bytes_per_s"):
            cap = getattr(self, name)
            no_cap = cap is None or (cap == NO_CAP and name != "bandwidth_bytes_per_s")
            if isinstance(cap, bool) or not (no_cap or LEAST_BANDWIDTH <= cap <= MAX_SIZE):
                raise MigrationError(
                    f"{flag(name)} {cap}: at least one page ({LEAST_BANDWIDTH} bytes) a second, or "
                    "none for no cap"
                )
        if every_s is not None and not 0.001 <= every_s <= MAX_CHECKPOINT_MS / 1000:
            raise MigrationError(
                f"checkpoints every {every_s} s: 0.001 s to {MAX_CHECKPOINT_MS / 1000:g} s"
            )
        if self.checkpoint_every_s is not None and not self.strategy.pages_after_handover:
            raise MigrationError(
                "--strategy precopy has nothing to protect: with it the guest arrives as a whole"
            )
        if (
            self.policy.timeout_s is not None
            and self.policy.on_timeout is OnTimeout.POSTCOPY
            and not self.strategy.pages_after_handover
        ):
            raise MigrationError(
                "--strategy precopy cannot end in postcopy when its --timeout has passed: choose "
                "cancel or suspend as --on-timeout (on_timeout in the configuration)"
            )

    @property
    def cap_of_postcopy(self) -> float | None:
        """Return the bytes a second of background copying after the handover; ``None``: any."""
        if self.postcopy_bandwidth_bytes_per_s is None:
            return self.bandwidth_bytes_per_s
        return self.postcopy_bandwidth_bytes_per_s or None


# ---- what can be changed while a migration runs ----
CHANGEABLE: dict[str, Until] = {
    one.name: one.metadata["until"]
    for options in (PolicyOptions, MigrationOptions)
    for one in dataclasses.fields(options)
    if "until" in one.metadata
}
"""The options that an operator may change, by the names of their fields."""


def flag(name: str) -> str:
    """Return the option of the command line that sets a field."""
    return "--" + re.sub("_(bytes_per_s|ms|s)$", "", name).replace("_", "-")


def policy_of(values: dict[str, Any]) -> PolicyOptions:
    """Return the options in a request.  Raises ``TypeError`` or ``ValueError`` for wrong ones."""
    return _with_policy(PolicyOptions(), values)


def _with_policy(policy: PolicyOptions, values: dict[str, Any]) -> PolicyOptions:
    if "on_timeout" in values:
        values = {**values, "on_timeout": OnTimeout(values["on_timeout"])}
    return dataclasses.replace(policy, **values)


def changed(options: MigrationOptions, values: dict[str, Any]) -> MigrationOptions:
    """Return the options with other values of some :data:`CHANGEABLE` ones.

    Raises :class:`MigrationError` for another option, for a value that is not allowed or that has
    no effect, and ``ValueError`` or ``TypeError`` for a value of a wrong type.
    """
    for name in values:
        if name not in CHANGEABLE:
            known = ", ".join(map(flag, CHANGEABLE))
            raise MigrationError(f"{name} cannot be changed while a migration runs; {known} can")
    own = {one.name for one in dataclasses.fields(MigrationOptions)}
    policy = _with_policy(options.policy, {k: v for k, v in values.items() if k not in own})
    after = dataclasses.replace(
        options, policy=policy, **{k: v for k, v in values.items() if k in own}
    )
    check_effect(after, values)
    return after


def check_effect(
    options: MigrationOptions, given: Iterable[str], written: Callable[[str], str] = flag
) -> None:
    """Check that each option that was ``given`` has an effect beside the others.  ``written``
    returns a field's option as the user writes it.

    Raises :class:`MigrationError` with the first option that has none.
    """
    reasons = dict[str, str]()
    if options.strategy is Strategy.PRECOPY:
        reasons["postcopy_bandwidth_bytes_per_s"] = (
            "not with --strategy precopy, which copies nothing after the handover"
        )
    if options.strategy is Strategy.POSTCOPY:
        why = "not with --strategy postcopy, which has no precopy"
        reasons |= {name: why for name, until in CHANGEABLE.items() if until is Until.SWITCHOVER}
    if options.policy.timeout_s is None:
        why = f"only with {written('timeout_s')}, because there is no time limit"
        reasons.setdefault("on_timeout", why)
    for name in given:
        if name in reasons:
            value = options.policy.on_timeout.value if name == "on_timeout" else ""
            raise MigrationError(f"{f'{written(name)} {value}'.strip()}: {reasons[name]}")


def shown(options: MigrationOptions, *, precopy: bool) -> dict[str, Any]:
    """Return the options that an operator may change, as JSON has them.  ``precopy``: with those
    that have an effect until the end of precopy only.
    """
    values = {**vars(options.policy), **vars(options)}
    values["on_timeout"] = options.policy.on_timeout.value
    return {
        name: values[name]
        for name, until in CHANGEABLE.items()
        if precopy or until is not Until.SWITCHOVER
    }
