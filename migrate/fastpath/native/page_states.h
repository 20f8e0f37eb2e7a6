/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The states of a page at either end, and the steps that faults and arriving pages take from one
 * state to the next (cffi reads this file as well).  The native loops and Python call the same
 * functions.  Python itself writes states in steps over many pages that no fault takes.
 *
 * The caller of a step holds the lock of the pages.  Lists of pfns may be of any length.
 */
struct fault_lock;

/* ---- the sender's (sender/backlog.py) ---- */
enum { PAGE_NOT_MISSING, PAGE_UNSENT, PAGE_SENT, PAGE_PULLED, PAGE_DONE };

#define PAGE_BLOCK 4096     /* the number of pfns whose unsent pages are counted together */

struct source_pages {
    struct fault_lock *lock;    /* of all that follows */
    uint8_t *state;             /* of each pfn */
    uint64_t nr_pfns;
    int64_t *left;              /* unsent pages of each block */
    int64_t unsent;             /* unsent pages of all blocks */
    uint64_t cursor;            /* the pfn from which pages are pushed next */
};

/* These pages are chosen to be sent, and the push continues behind the last one. */
void source_sent(struct source_pages *p, const uint64_t *pfns, size_t n);

/*
 * vCPUs wait for these pages.  wanted[i] becomes 1 for a page that must be sent on the pull lane
 * now.  It becomes 0 for a page that is DONE (its acknowledgement and the request have crossed),
 * and for one that is PULLED (the page precedes all that is sent on this lane now).  Returns n.  If
 * a pfn was never missing, nothing is done, and the index of the first such pfn is returned.
 */
size_t source_fault(struct source_pages *p, const uint64_t *pfns, size_t n, uint8_t *wanted);

/* ---- the receiver's (receiver/outstanding.py) ---- */
/* The order matters: OUTSTANDING to LOADING are not loaded yet, and no vCPU waits from READY on. */
enum { PAGE_PRESENT, PAGE_OUTSTANDING, PAGE_REQUESTED, PAGE_LOADING, PAGE_READY, PAGE_DROPPED };

#define FAULT_SLOTS 8       /* the slots of the ring, and so the most requests that can be open */

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

/* What the caller has to do after a step. */
struct page_actions {
    struct waiting_request answer[FAULT_SLOTS];     /* respond to these requests */
    uint64_t ask[FAULT_SLOTS];                      /* request these pages from the sender */
    uint64_t touched[FAULT_SLOTS];                  /* vCPUs need these pages, here or not */
    uint64_t dropped[FAULT_SLOTS];                  /* the sender need not send these pages */
    uint32_t nr_answers, nr_ask, nr_touched, nr_dropped;
};

/* Requests of the ring.  Returns 0; or -EPROTO, and does nothing, if more than can be open. */
int destination_requests(struct destination_pages *p, const struct ring_request *requests, size_t n,
                         double now, struct page_actions *actions);

/*
 * These pages have arrived.  wanted[i] becomes 1 for a page that the caller has to load (the page
 * is LOADING), 0 for a later copy.  Returns n.  If a pfn was never missing, nothing is done, and
 * the index of the first such pfn is returned.
 */
size_t destination_claim(struct destination_pages *p, const uint64_t *pfns, size_t n,
                         uint8_t *wanted);

/* These pages were claimed and have not been loaded; they have to be sent again. */
void destination_unclaim(struct destination_pages *p, const uint64_t *pfns, size_t n);

/*
 * These pages were claimed and are loaded (result 0), or the guest has given them away meanwhile.
 * Of the actions only the answers are set.
 */
void destination_finish(struct destination_pages *p, const uint64_t *pfns, const int32_t *results,
                        size_t n, struct page_actions *actions);
