/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Single pages, and the ring with its event channel, for native code that serves faults without the
 * interpreter.
 */
#include <poll.h>
#include "internal.h"

/* ---- pages ---- */
/*
 * Python changes the slots under a lock of its own, for which this code must not wait.  A reader
 * increments looking before it loads the slot; the unmapper clears the slots before it loads
 * looking.  Either the reader sees an empty slot, or the unmapper sees the reader.
 */
int xen_held_idle(struct xen_held *held)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return !__atomic_load_n(&held->looking, __ATOMIC_SEQ_CST);
}

static void held_looked_at(struct xen_held *held)
{
    __atomic_sub_fetch(&held->looking, 1, __ATOMIC_SEQ_CST);
}

static int look_at_held(struct xen_held *held, uint64_t gfn, const void **page)
{
    uint8_t status = PAGE_BROKEN;       /* not held; the domain may be gone, which Python checks */
    uint32_t slot;

    __atomic_add_fetch(&held->looking, 1, __ATOMIC_SEQ_CST);
    slot = __atomic_load_n(&held->slot[gfn], __ATOMIC_ACQUIRE);
    if (slot != NOT_HELD) {
        const uint64_t *address = __atomic_load_n(&held->address, __ATOMIC_ACQUIRE);
        struct xen_run run;

        *page = (const void *)(uintptr_t)(address[slot / CHUNK_PAGES] +
                                          slot % CHUNK_PAGES * XC_PAGE_SIZE);
        status = PAGE_DATA;
        xen_look(page, 1, &status, &run);
    }
    if (status != PAGE_DATA)
        held_looked_at(held);
    return status;
}

int xen_look_at(struct xen_domain *d, uint64_t gfn, const void **page)
{
    struct xen_view view;
    uint8_t status;

    if (d->ring_gfn && gfn == d->ring_gfn)
        return PAGE_HOLE;
    if (d->held)
        return look_at_held(d->held, gfn, page);
    if (xen_map(d->host, d->domid, &gfn, 1, &status, page, &view))
        return PAGE_BROKEN;
    if (status == PAGE_DATA) {
        struct xen_run run;

        xen_look(page, 1, &status, &run);
    }
    if (status != PAGE_DATA)
        xen_unmap(d->host, &view);
    return status;
}

void xen_looked_at(struct xen_domain *d, const void *page)
{
    struct xen_view view = { .address = (void *)page, .pages = 1 };

    if (d->held)
        held_looked_at(d->held);
    else
        xen_unmap(d->host, &view);
}

int xen_load_at(struct xen_domain *d, uint64_t gfn, const void *page)
{
    int32_t result;
    int rc = xen_load(d->host, d->domid, &gfn, 1, page, &result);

    return rc ? rc : result;
}

/* ---- the ring ---- */
int xen_ring_consume(struct xen_ring *r, void *out)
{
    struct pollfd fired = { .fd = r->pager->event_fd, .events = POLLIN };

    /* Before the ring is read: otherwise the event of a later request could be consumed. */
    if (poll(&fired, 1, 0) > 0) {
        int rc = xen_event_take(r->pager);

        if (rc)
            return rc;
    }
    return r->consume(r->ring, out);
}

int xen_ring_respond(struct xen_ring *r, const void *answered, int n)
{
    int rc = r->respond(r->ring, answered, n);

    return rc ? rc : xen_event_notify(r->pager);
}
