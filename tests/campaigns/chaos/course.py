# SPDX-License-Identifier: GPL-2.0-or-later
"""The course of a trial: its migration begins, faults happen, and the guest must have its end."""

from __future__ import annotations

import contextlib
import functools
import time

import trio

from migrate.cli.world import verify_migrated, wait_for_steps
from migrate.control.client import ControlClient
from migrate.errors import MigrationError
from migrate.outcomes import ENDED
from migrate.tasks import task_group
from tests.campaigns.chaos.trial import END_S, MIB, Decision, Fault, Line, Trial, destroy, in_thread
from tests.campaigns.chaos.world import LostError
from xenbackend.contract import DomainState
from xenbackend.simulated.client import SimulatedDomain, SimulatedHypervisor
from xenbackend.simulated.verify import verify

WINDOW_S = 0.7
"""The time in which faults happen."""
DESTROYED_S = 3.0
"""After this time an operator destroys what is left of a guest that was destroyed at one end."""
WATCH_EVERY_S = 0.03
NO_WAY_BACK = "cannot continue here"
"""A part of the answer to a decision for a source whose checkpoint is damaged."""
PROTECTED = 0.4
"""The share of trials with checkpoints in which one fault is of the kind that needs them."""


async def run(trial: Trial, faults: list[Fault]) -> str:
    """Run the trial.  Returns where the guest was in the end.  Raises :class:`LostError`."""
    possible = [
        f
        for f in faults
        if (trial.world.tls or not f.tls)
        and (trial.checkpoint_every_s is not None or not f.protected)
        and not (trial.beside is not None and f.notices == "all")
    ]
    count = trial.random.choice([1, 1, 2, 3]) if possible else 0
    trial.chosen = [trial.random.choice(possible) for _ in range(count)]
    protected = [fault for fault in possible if fault.protected]
    if protected and trial.random.random() < PROTECTED:
        trial.chosen[0] = trial.random.choice(protected)
    beside = await in_thread(_begin_beside, trial)
    await in_thread(_begin, trial)
    async with task_group() as watching:
        watching.start_soon(_watch, trial)
        async with task_group() as tasks:
            if trial.strategy == "hybrid":
                tasks.start_soon(_end_precopy, trial)
            for fault in trial.chosen:
                tasks.start_soon(trial.happen, fault, trial.random.uniform(0, WINDOW_S))
        trial.link.to = ("127.0.0.1", trial.world.port)
        trial.link.restore()
        await _settle(trial)
        watching.cancel_scope.cancel()
    where: str = await in_thread(_verify, trial)
    await in_thread(_check_outcome, trial, where)
    if beside is not None:
        await in_thread(_verify_beside, trial, beside)
    await in_thread(trial.world.end_hang_ups)
    await in_thread(trial.world.check_remnants)
    trial.world.check()
    return where


def _begin(trial: Trial) -> None:
    guest = trial.world.source.create_guest(trial.spec.to_bytes())
    wait_for_steps(guest, 5 if trial.spec.workload == "idle" else 50)
    guest.close()
    with trial.world.control("sender") as client:
        client.send(**trial.migration(trial.spec.name, trial.link.port))
        answer = client.answer()
    assert answer is not None
    trial.id = answer["id"]


def _begin_beside(trial: Trial) -> ControlClient | None:
    if trial.beside is None:
        return None
    trial.world.source.create_guest(trial.beside.to_bytes()).close()
    client = trial.world.control("sender")
    client.send(
        command="migrate", domain=trial.beside.name, destination=f"127.0.0.1:{trial.world.port}",
        strategy=trial.random.choice(["hybrid", "postcopy"]), bandwidth=8 * MIB,
        policy={"max_rounds": 2},
    )  # fmt: skip
    return client


# ---- meanwhile ----
async def _end_precopy(trial: Trial) -> None:
    """Have pages missing after precopy in most trials with ``hybrid``.  Otherwise the sender would
    send the few pages of these guests before the handover.
    """
    await trio.sleep(trial.seed % 8 / 20)
    request = {"command": "postcopy-now", "migration": trial.id}
    async with trial.killing:
        with contextlib.suppress(MigrationError):
            await trial.answered(functools.partial(trial.world.ask, "sender", **request))


async def _watch(trial: Trial) -> None:
    """Raises :class:`LostError` if the guest runs at both ends and no operator may have caused
    that.
    """
    while not trial.may_run_twice:
        if await in_thread(_runs_twice, trial) and not trial.may_run_twice:
            raise LostError("the guest runs at both ends")
        await trio.sleep(WATCH_EVERY_S)


def _runs_twice(trial: Trial) -> bool:
    """Whether the same domain runs at the source before and after a domain runs at the
    destination.
    """

    def running(host: SimulatedHypervisor) -> set[int]:
        return {
            info.domid
            for info in host.domains()
            if info.name == trial.spec.name and info.state is DomainState.RUNNING
        }

    before = running(trial.world.source)
    return bool(before and running(trial.world.destination)) and bool(
        before & running(trial.world.source)
    )


# ---- the end ----
async def _settle(trial: Trial) -> None:
    began = time.monotonic()
    while True:
        mine = {which: await trial.answered(trial.lines, which) for which in trial.world.daemons}
        if all(line["phase"] in ENDED for lines in mine.values() for line in lines):
            return
        waited_s = time.monotonic() - began
        if waited_s > END_S:
            raise LostError(f"it does not end: {mine}")
        if trial.destroyed and waited_s > DESTROYED_S and _loss_is_known(trial, mine):
            for host in (trial.world.source, trial.world.destination):
                await in_thread(destroy, host, trial.spec.name)
        if trial.decisions and waited_s > DESTROYED_S:
            await trial.answered(_clean_up, trial, mine)
        for which, lines in mine.items():
            for line in lines:
                if line.get("paused"):
                    await trial.answered(_resume, trial, which, line["id"])
                with contextlib.suppress(MigrationError):
                    decided = await trial.answered(_encourage, trial, which, line["id"])
                    if decided and trial.kill_decided:
                        trial.kill_decided = False
                        await trio.sleep(trial.random.uniform(0, 0.06))
                        trial.faults.append("sender killed after the decision")
                        await trial.kill("sender")
        await trio.sleep(0.05)


def _resume(trial: Trial, which: str, migration: str) -> None:
    with contextlib.suppress(MigrationError):  # the migration may have ended meanwhile
        trial.world.ask(which, command="resume", migration=migration)


def _loss_is_known(trial: Trial, mine: dict[str, list[Line]]) -> bool:
    """Whether the sender has reported to the receiver that pages are lost."""
    return not trial.source_lost or all(
        line["phase"] in ("lost", *ENDED) for line in mine["receiver"] if line["id"] == trial.id
    )


def _clean_up(trial: Trial, mine: dict[str, list[Line]]) -> None:
    """After a wrong decision an operator decides again, or destroys a guest that cannot
    continue.
    """
    for which, line in [(w, line) for w in ("sender", "receiver") for line in mine[w]]:
        if line["id"] != trial.id or line["phase"] in ENDED:
            continue
        with contextlib.suppress(MigrationError):  # the migration may have ended meanwhile
            match which, line["phase"]:
                case "receiver", "held":
                    _check_held(trial, line)
                    _decide(trial, Decision("receiver", here=False, force=False))
                case "receiver", "lost" | "interrupted" | "in doubt" if (
                    trial.abandoned
                    or Decision("receiver", here=True, force=True) in trial.decisions
                ):
                    destroy(trial.world.destination, trial.spec.name)
                case "sender", "interrupted" if (
                    Decision("receiver", here=False, force=False) in trial.decisions
                    or Decision("receiver", here=False, force=True) in trial.decisions
                ):
                    _decide(trial, Decision("sender", here=True, force=True))


def _check_held(trial: Trial, line: Line) -> None:
    """Check that a guest that is shown as ``held`` does not run."""
    running = [
        info
        for info in trial.world.destination.domains()
        if info.name == trial.spec.name and info.state is DomainState.RUNNING
    ]
    if running and "is paused here" in line["problem"]:
        raise LostError(f"the guest runs at the destination, and is shown as: {line['problem']}")


def _decide(trial: Trial, decision: Decision) -> None:
    """Make a decision.  Raises :class:`MigrationError` if the daemon refuses."""
    trial.may_run_twice |= decision.here
    trial.world.ask(
        decision.at, command="decide", migration=trial.id, here=decision.here,
        force=decision.force,
    )  # fmt: skip
    trial.decisions.append(decision)


def _encourage(trial: Trial, which: str, migration: str) -> bool:
    """Do what an operator would do.  Returns whether a decision was needed, and accepted."""
    if migration in trial.lost_there and which == "sender":
        for force in (False, True):  # without a checkpoint only --force lets the guest continue
            try:
                trial.world.ask(
                    which, command="decide", migration=migration, here=True, force=force
                )
                return True
            except MigrationError as error:  # the daemon has not noticed the loss yet
                if force and trial.checkpoint_damaged and NO_WAY_BACK in str(error):
                    _decide(trial, Decision("sender", here=False, force=False))
                    return True
    if trial.destroyed and which == "sender":
        with contextlib.suppress(MigrationError):  # what is destroyed here may be missing there
            trial.world.ask(which, command="decide", migration=migration, here=False)
    trial.world.ask(which, command="reconnect", migration=migration)
    return False


def _places(trial: Trial) -> list[tuple[str, SimulatedHypervisor, DomainState]]:
    hosts = {"source": trial.world.source, "destination": trial.world.destination}
    return [
        (w, h, i.state) for w, h in hosts.items() for i in h.domains() if i.name == trial.spec.name
    ]


def _verify(trial: Trial) -> str:
    deadline = time.monotonic() + 10  # the successor of a killed sender destroys what was left
    while True:
        places = _places(trial)
        if [state for _where, _host, state in places] == [DomainState.RUNNING]:
            break
        if not places and (trial.destroyed or trial.abandoned):
            return "destroyed"
        if not places and trial.lost_there and trial.has_arrived():
            return "gone with its host"  # the host was lost when all pages had arrived
        if trial.decisions:
            _end_paused(trial, places)
        if time.monotonic() > deadline:
            raise LostError(f"it runs at {[(where, state.value) for where, _h, state in places]}")
        time.sleep(0.02)
    ((where, host, _state),) = places
    with host.open(trial.spec.name) as domain:
        problems = _verified(trial, domain, where)
        domain.destroy()
    if problems:
        raise LostError(f"at the {where}: {'; '.join(problems)}")
    return where


def _end_paused(trial: Trial, places: list[tuple[str, SimulatedHypervisor, DomainState]]) -> None:
    """Check a guest that was complete when it was recalled, and is paused at the destination."""
    states = [(where, state) for where, _host, state in places]
    if states == [("source", DomainState.RUNNING), ("destination", DomainState.PAUSED)]:
        destroy(trial.world.destination, trial.spec.name)


def _verified(trial: Trial, domain: SimulatedDomain, where: str) -> list[str]:
    wait_for_steps(domain, 5 if trial.spec.workload == "idle" else 50)
    domain.suspend()
    gone = [report for report in trial.world.source.history() if report["name"] == trial.spec.name]
    came = where == "destination" and "onward" not in trial.again
    positions = [vcpu["count"] for vcpu in gone[-1]["vcpu"]] if gone and came else None
    left = ["log-dirty is on"] if domain.log_dirty_is_on() else []
    return [*left, *verify(domain, trial.spec, source_positions=positions).problems]


def _check_outcome(trial: Trial, where: str) -> None:
    """Check that what was answered was done, and that other guests noticed nothing."""
    lines = {which: trial.line(which) for which in ("sender", "receiver")}
    for which, line in lines.items():
        if line is not None and line["phase"] == "completed" and trial.id in trial.cancelled:
            raise LostError(f"it was cancelled, and is completed at the {which}")
    if trial.id in trial.cancelled and not trial.again and where not in ("source", "destroyed"):
        raise LostError(f"it was cancelled, and the guest is at the {where}")
    at_source = [d.here for d in trial.decisions if d.at == "sender"]
    if at_source and not (trial.destroyed or trial.again):
        (here, *_earlier) = reversed(at_source)
        if where == ("destination" if here else "source"):
            raise LostError(f"the guest is at the {where}, but {trial.decisions}")
    may_end_early = trial.policy.get("on_timeout") == "cancel"
    if not trial.nobody_may_notice or trial.cancelled or trial.again or may_end_early:
        return
    if where != "destination":
        raise LostError(f"what must not be noticed kept it at the {where}")
    for which, line in lines.items():
        if line is not None and line["unprotected"]:
            raise LostError(
                f"what must not be noticed ended its protection at the {which}: "
                f"{line['unprotected']}"
            )
    details = trial.world.ask("sender", command="show", migration=trial.id)["details"]
    if details["rejoins"]:
        raise LostError(f"what must not be noticed cost it its lanes {details['rejoins']} times")


def _verify_beside(trial: Trial, client: ControlClient) -> None:
    """Check that the other guest has arrived undamaged, over the lanes with which it began."""
    assert trial.beside is not None
    with client:
        try:
            *_progress, last = client.answers()
        except MigrationError as error:
            raise LostError(f"the other guest did not arrive: {error}") from error
    if last["result"]["rejoins"]:
        raise LostError(f"the other guest lost its lanes {last['result']['rejoins']} times")
    verification, _view = verify_migrated(trial.world, trial.beside)
    if verification.problems:
        raise LostError(f"the other guest: {'; '.join(verification.problems)}")
    destroy(trial.world.destination, trial.beside.name)
