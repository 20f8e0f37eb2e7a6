/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The states of a page at either end, and the steps from one state to the next (cffi reads this
 * file as well).  The native loops and Python call the same functions.
 *
 * The caller of a step holds the lock of the pages.  Lists of pfns may be of any length.
 */
struct fault_lock;

/* ---- the sender's (sender/backlog.py) ---- */
enum { PAGE_NOT_OURS, PAGE_UNSENT, PAGE_SENT, PAGE_DONE };

#define PAGE_BLOCK 4096     /* pfns of which the unsent pages are counted together */

struct source_pages {
    struct fault_lock *lock;    /* of all that follows */
    uint8_t *state;             /* of each pfn */
    uint64_t nr_pfns;
    int64_t *left;              /* unsent pages of each block */
    int64_t unsent;             /* unsent pages of all blocks */
    uint64_t cursor;            /* from where pages are pushed next */
};

/* These pages are sent now, for whatever reason, and the push continues behind the last one. */
void source_sent(struct source_pages *p, const uint64_t *pfns, size_t n);

/*
 * vCPUs wait for these pages.  wanted[i] becomes 1 for a page that shall be sent now, 0 for a page
 * that is DONE (its acknowledgement and the request have crossed).  Returns n; or, having done
 * nothing, the index of the first pfn that was never missing.
 */
size_t source_fault(struct source_pages *p, const uint64_t *pfns, size_t n, uint8_t *wanted);

/* ---- the receiver's (receiver/outstanding.py) ---- */
/* In this order: pages before LOADING are to come, and nobody waits for one from READY on. */
enum { PAGE_PRESENT, PAGE_OUTSTANDING, PAGE_REQUESTED, PAGE_LOADING, PAGE_READY, PAGE_DROPPED };

#define FAULT_SLOTS 8       /* of the ring: no more requests can be open at a time */

struct waiting_request {
    struct ring_request request;
    double since, until;        /* CLOCK_MONOTONIC, in seconds */
};

struct destination_pages {
    struct fault_lock *lock;    /* of all that follows, and of the ring */
    uint8_t *state;             /* of each pfn */
    uint64_t nr_pfns;
    struct waiting_request waiting[FAULT_SLOTS];    /* every request that is not answered */
    uint32_t nr_waiting;
};

/* What the caller shall do after a step. */
struct page_actions {
    struct waiting_request answer[FAULT_SLOTS];     /* respond to these requests */
    uint64_t ask[FAULT_SLOTS];                      /* request these pages from the sender */
    uint64_t touched[FAULT_SLOTS];                  /* vCPUs need these pages, here or not */
    uint64_t dropped[FAULT_SLOTS];                  /* the sender need not send these pages */
    uint32_t nr_answers, nr_ask, nr_touched, nr_dropped;
};

/* Requests of the ring.  Returns 0; or, having done nothing, -EPROTO: more than can be open. */
int destination_requests(struct destination_pages *p, const struct ring_request *requests, size_t n,
                         double now, struct page_actions *actions);

/*
 * These pages have arrived.  wanted[i] becomes 1 for a page that the caller shall load (the page is
 * LOADING), 0 for a later copy.  Returns n; or, having done nothing, the index of the first pfn
 * that was never missing.
 */
size_t destination_claim(struct destination_pages *p, const uint64_t *pfns, size_t n,
                         uint8_t *wanted);

/* These pages, which were claimed, have not been loaded: they are to come again. */
void destination_unclaim(struct destination_pages *p, const uint64_t *pfns, size_t n);

/*
 * These pages, which were claimed, are loaded (result 0), or the guest has given them away
 * meanwhile.  Of the actions only the answers are set.
 */
void destination_finish(struct destination_pages *p, const uint64_t *pfns, const int32_t *results,
                        size_t n, struct page_actions *actions);
