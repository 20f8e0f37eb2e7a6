# SPDX-License-Identifier: GPL-2.0-or-later
"""The verification that a guest's memory was migrated, byte for byte.

The verifier takes the guest's description from the program that booted the guest, not from the
migration.  From the domain it takes only the positions of the vCPUs and of the balloon.  The vCPUs
must be at or beyond the positions at which the source stopped them.  The verifier computes all
memory from image, program and positions, and compares the result with the memory file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xenbackend.contract import DomainState
from xenbackend.pages import PAGE_SIZE, PfnArray
from xenbackend.simulated._sim import ffi, lib
from xenbackend.simulated.client import PAGING_TYPES, RAM_TYPES, SimulatedDomain
from xenbackend.simulated.guest import GuestSpec

WINDOW_PAGES = 4096


@dataclass
class Verification:
    """The result of a verification.  ``problems`` is empty if the memory is correct."""

    problems: list[str] = field(default_factory=list)
    pages: int = 0
    """Pages compared."""
    differing: PfnArray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    domain: SimulatedDomain, spec: GuestSpec, *, source_positions: list[int] | None = None
) -> Verification:
    """Compare a suspended domain with what its memory must hold.

    ``source_positions``: each vCPU's count when the source stopped the vCPU.  The count must not be
    less now.
    """
    result = Verification()
    report = domain.report()
    if report["state"] != DomainState.SUSPENDED.value:
        result.problems.append(f"the guest is {report['state']} {report['reason']}".rstrip())
        if report["state"] != DomainState.CRASHED.value:
            return result
    positions = [vcpu["count"] for vcpu in report["vcpu"]]
    for number, vcpu in enumerate(report["vcpu"]):
        if vcpu["errors"]:
            result.problems.append(
                f"vCPU {number} read {vcpu['errors']} wrong values while it ran, the first at pfn "
                f"{vcpu['first_error_pfn']:#x}"
            )
        if source_positions is not None and vcpu["count"] < source_positions[number]:
            result.problems.append(
                f"vCPU {number} went back from step {source_positions[number]} to {vcpu['count']}"
            )
    for count in ("spurious_responses", "premature_responses"):
        if report[count]:
            result.problems.append(f"{report[count]} {count.replace('_', ' ')} on the paging ring")
    if report["overlaid"]:
        result.problems.append(
            f"the balloon took {report['overlaid']} pages back where there was memory still"
        )
    _compare_memory(domain, spec, positions, report["balloon_steps"], result)
    return result


def _compare_memory(
    domain: SimulatedDomain,
    spec: GuestSpec,
    positions: list[int],
    balloon_steps: int,
    result: Verification,
) -> None:
    program = spec.program()
    visits = np.zeros((spec.vcpus, spec.working_pages), dtype=np.uint64)
    for vcpu, count in enumerate(positions):
        lib.sim_expected_visits(program, vcpu, count, ffi.from_buffer("uint64_t[]", visits[vcpu]))
    holes, taken = _balloon(program, spec, balloon_steps)
    actual = np.zeros(WINDOW_PAGES * PAGE_SIZE, dtype=np.uint8)
    bad: list[PfnArray] = []
    absent = 0
    for pages, expected in _initial_memory(program, spec):
        first, n = pages.start, len(pages)
        pfn = spec.pfn(first)
        pfns = np.arange(pfn, pfn + n, dtype=np.uint64)
        domain.raw_memory(pfn, actual.data[: n * PAGE_SIZE])
        differs = np.zeros(n, dtype=np.uint8)
        lib.sim_compare_pages(
            program,
            first,
            n,
            ffi.from_buffer("uint64_t[]", visits),
            ffi.from_buffer("uint64_t[]", taken[first : first + n]),
            ffi.from_buffer("uint8_t[]", expected),
            ffi.from_buffer("uint8_t[]", actual),
            ffi.from_buffer("uint8_t[]", differs),
        )
        types = domain.p2m_types(pfns)
        no_memory = ~np.isin(types, RAM_TYPES)
        hole = holes[first : first + n]
        wrong = np.where(hole, types != lib.P2M_HOLE, no_memory | differs.astype(np.bool_))
        absent += int(np.count_nonzero(np.isin(types[wrong], PAGING_TYPES)))
        bad.append(pfns[wrong])
        result.pages += n
    result.differing = np.concatenate(bad)
    if len(result.differing):
        listed = ", ".join(f"{pfn:#x}" for pfn in result.differing[:5])
        result.problems.append(
            f"{len(result.differing)} of {result.pages} pages differ from what the guest wrote "
            f"({absent} still paged out): pfns {listed}"
            + (", ..." if len(result.differing) > 5 else "")
        )


def _balloon(
    program: Any, spec: GuestSpec, steps: int
) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """Return for each page whether it is a hole after so many steps of the balloon, and how often
    the balloon has taken memory for it again.
    """
    holes = np.zeros(spec.pages, dtype=np.bool_)
    taken = np.zeros(spec.pages, dtype=np.uint64)
    for number in range(spec.balloon_pages):
        page = lib.sim_balloon_page(program, spec.nr_pfns, number)
        taken[page] = lib.sim_balloon_taken(program, steps, number)
        holes[page] = lib.sim_balloon_given(program, steps, number) > taken[page]
    return holes, taken


def _initial_memory(program: Any, spec: GuestSpec) -> Iterator[tuple[range, NDArray[np.uint8]]]:
    """Yield all pages in windows, each with the memory with which the guest was booted.  The pages
    of a window have consecutive pfns.

    The array of memory is ``WINDOW_PAGES`` pages long and is used again for the next window.
    """
    memory = np.zeros(WINDOW_PAGES * PAGE_SIZE, dtype=np.uint8)
    with contextlib.ExitStack() as files:
        image = files.enter_context(open(spec.image, "rb", buffering=0)) if spec.image else None
        for piece in spec.pieces:
            for at in range(0, len(piece), WINDOW_PAGES):
                pages = piece[at : at + WINDOW_PAGES]
                if image is None:
                    into = ffi.from_buffer("uint8_t[]", memory)
                    lib.sim_image_pages(program, pages.start, len(pages), into)
                else:
                    memory[:] = 0
                    view = memory.data[: len(pages) * PAGE_SIZE]
                    while len(view) and (got := image.readinto(view)):
                        view = view[got:]
                yield pages, memory
