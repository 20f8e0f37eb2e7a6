/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The sender's end: the states of its pages, and the answers to faults. */
#include <string.h>
#include <sys/socket.h>
#include "internal.h"

enum { PAGE_DATA, PAGE_ZERO };  /* PageStatus in xenbackend/pages.py */

/* ---- the states of pages ---- */
static void page_sent(struct source_pages *p, uint64_t pfn, uint8_t state)
{
    if (p->state[pfn] == PAGE_UNSENT) {
        p->left[pfn / PAGE_BLOCK]--;
        p->unsent--;
    }
    if (p->state[pfn] < state)
        p->state[pfn] = state;
    p->cursor = (pfn + 1) % p->nr_pfns;
}

void source_sent(struct source_pages *p, const uint64_t *pfns, size_t n)
{
    for (size_t i = 0; i < n; i++)
        page_sent(p, pfns[i], PAGE_SENT);
}

size_t source_fault(struct source_pages *p, const uint64_t *pfns, size_t n, uint8_t *wanted)
{
    for (size_t i = 0; i < n; i++)
        if (pfns[i] >= p->nr_pfns || p->state[pfns[i]] == PAGE_NOT_MISSING)
            return i;
    for (size_t i = 0; i < n; i++) {
        wanted[i] = p->state[pfns[i]] < PAGE_PULLED;
        if (wanted[i])
            page_sent(p, pfns[i], PAGE_PULLED);
    }
    return n;
}

/* ---- faults ---- */
struct faults {
    size_t n;
    uint64_t pfns[FAULT_SLOTS];
    const void *pages[FAULT_SLOTS];     /* NULL: zeros */
    uint8_t wanted[FAULT_SLOTS];
};

/* Returns 0 if the buffer holds anything else than faults. */
static int read_faults(const struct fault_source *s, const uint8_t *buffer, long got,
                       struct faults *faults)
{
    uint32_t size = s->lane.fault.size;

    faults->n = 0;
    if (got <= 0 || got % size || got / size > FAULT_SLOTS)
        return 0;
    for (; faults->n < (size_t)got / size; faults->n++) {
        int64_t pfn = fault_frame_pfn(&s->lane.fault, buffer + faults->n * size);

        if (pfn < 0 || (uint64_t)pfn >= s->pages->nr_pfns)
            return 0;
        faults->pfns[faults->n] = pfn;
        faults->pages[faults->n] = NULL;
    }
    return 1;
}

/* Returns 0 if one of the pages is neither data nor zeros. */
static int map_pages(const struct fault_source *s, struct faults *faults)
{
    for (size_t i = 0; i < faults->n; i++) {
        int status = s->look(s->domain, faults->pfns[i], &faults->pages[i]);

        if (status != PAGE_DATA)
            faults->pages[i] = NULL;
        if (status != PAGE_DATA && status != PAGE_ZERO)
            return 0;
    }
    return 1;
}

/* Returns 0 if one of the pages was never missing. */
static int take_pages(struct fault_source *s, struct faults *faults)
{
    size_t n;

    fault_lock_take(s->pages->lock);
    n = source_fault(s->pages, faults->pfns, faults->n, faults->wanted);
    fault_lock_give(s->pages->lock);
    return n == faults->n;
}

static int send_page(struct fault_source *s, uint64_t pfn, const void *page)
{
    const struct fault_frame *kind = page ? &s->lane.page : &s->lane.zero;
    uint8_t head[sizeof(kind->bytes)], copy[PAGE_BYTES];
    struct iovec vector[2] = { { head, kind->size }, { (void *)page, PAGE_BYTES } };

    if (page && kind->covers_page)  /* what is sent must be what the checksum is of */
        page = vector[1].iov_base = memcpy(copy, page, PAGE_BYTES);
    fault_frame_make(kind, pfn, page, head);
    if (lane_send(&s->lane, vector, page ? 2 : 1))
        return -1;
    s->nr_sent++;
    s->nr_zeros += !page;
    return 0;
}

long fault_serve(struct fault_source *s, void *buffer, size_t size, int wait)
{
    for (;;) {
        struct faults faults;
        long got = lane_receive(&s->lane, buffer, size, wait ? 0 : MSG_DONTWAIT);
        int taken, failed = 0;

        if (!lane_is_open(&s->lane) || !read_faults(s, buffer, got, &faults))
            return got;
        taken = map_pages(s, &faults) && take_pages(s, &faults);
        for (size_t i = 0; i < faults.n; i++) {
            if (taken && !failed && faults.wanted[i])
                failed = send_page(s, faults.pfns[i], faults.pages[i]);
            if (s->looked && faults.pages[i])
                s->looked(s->domain, faults.pages[i]);
        }
        if (failed)
            return 0;
        if (!taken)
            return got;
    }
}
