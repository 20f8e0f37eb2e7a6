/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The receiver's end: the states of its pages, who waits for them, the ring and the pull lane. */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include "internal.h"
#include "vm_event.h"

_Static_assert(FAULT_SLOTS == VM_EVENT_SLOTS, "the table of waiting requests holds a whole ring");

/* ---- the states of pages ---- */
static int state_of(const struct destination_pages *p, uint64_t pfn)
{
    return pfn < p->nr_pfns ? p->state[pfn] : PAGE_PRESENT;
}

static int is_to_come(int state)
{
    return state == PAGE_OUTSTANDING || state == PAGE_REQUESTED;
}

static int is_awaited(const struct destination_pages *p, uint64_t pfn)
{
    for (uint32_t i = 0; i < p->nr_waiting; i++)
        if (p->waiting[i].request.gfn == pfn)
            return 1;
    return 0;
}

static void add_answer(struct page_actions *actions, struct waiting_request request)
{
    actions->answer[actions->nr_answers++] = request;
}

/* Take each request for a page that is READY or DROPPED off the table, to be answered. */
static void answer_waiting(struct destination_pages *p, struct page_actions *actions)
{
    uint32_t left = 0;

    for (uint32_t i = 0; i < p->nr_waiting; i++) {
        if (p->state[p->waiting[i].request.gfn] >= PAGE_READY)
            add_answer(actions, p->waiting[i]);
        else
            p->waiting[left++] = p->waiting[i];
    }
    p->nr_waiting = left;
}

/* The guest gave the page away.  If the page is LOADING, the load fails with ENOENT. */
static void handle_drop(struct destination_pages *p, uint64_t pfn, struct page_actions *actions)
{
    if (is_to_come(state_of(p, pfn))) {
        p->state[pfn] = PAGE_DROPPED;
        actions->dropped[actions->nr_dropped++] = pfn;
        answer_waiting(p, actions);
    }
}

static void handle_touch(struct destination_pages *p, struct waiting_request waiting,
                         struct page_actions *actions)
{
    uint64_t pfn = waiting.request.gfn;
    int state = state_of(p, pfn);

    actions->touched[actions->nr_touched++] = pfn;
    /* MEM_PAGING_EVICT_FAIL, "the frame is still here", is ignored: the flag was true when the
     * hypervisor set it, but the page may have been evicted since. */
    if (!is_to_come(state) && state != PAGE_LOADING) {
        /* The page is here, or arrived after the request was made.  Or the page is gone; then the
         * guest gets the reason when it tries again. */
        add_answer(actions, waiting);
        return;
    }
    p->waiting[p->nr_waiting++] = waiting;
    if (state == PAGE_OUTSTANDING) {
        p->state[pfn] = PAGE_REQUESTED;
        actions->ask[actions->nr_ask++] = pfn;
    }
}

int destination_requests(struct destination_pages *p, const struct ring_request *requests, size_t n,
                         double now, struct page_actions *actions)
{
    uint32_t asked = 0;

    actions->nr_answers = actions->nr_ask = actions->nr_touched = actions->nr_dropped = 0;
    if (n > FAULT_SLOTS - p->nr_waiting)
        return -EPROTO;
    for (size_t i = 0; i < n; i++) {
        struct waiting_request waiting = { .request = requests[i], .since = now };

        if (requests[i].paging_flags & MEM_PAGING_DROP_PAGE) {
            add_answer(actions, waiting);
            handle_drop(p, requests[i].gfn, actions);
        } else {
            handle_touch(p, waiting, actions);
        }
    }
    for (uint32_t i = 0; i < actions->nr_ask; i++)  /* without those that were dropped after that */
        if (p->state[actions->ask[i]] == PAGE_REQUESTED)
            actions->ask[asked++] = actions->ask[i];
    actions->nr_ask = asked;
    return 0;
}

size_t destination_claim(struct destination_pages *p, const uint64_t *pfns, size_t n,
                         uint8_t *wanted)
{
    for (size_t i = 0; i < n; i++)
        if (state_of(p, pfns[i]) == PAGE_PRESENT)
            return i;
    for (size_t i = 0; i < n; i++) {
        wanted[i] = is_to_come(p->state[pfns[i]]);
        if (wanted[i])
            p->state[pfns[i]] = PAGE_LOADING;
    }
    return n;
}

void destination_unclaim(struct destination_pages *p, const uint64_t *pfns, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p->state[pfns[i]] = is_awaited(p, pfns[i]) ? PAGE_REQUESTED : PAGE_OUTSTANDING;
}

void destination_finish(struct destination_pages *p, const uint64_t *pfns, const int32_t *results,
                        size_t n, struct page_actions *actions)
{
    actions->nr_answers = actions->nr_ask = actions->nr_touched = actions->nr_dropped = 0;
    for (size_t i = 0; i < n; i++)
        p->state[pfns[i]] = results[i] ? PAGE_DROPPED : PAGE_READY;
    answer_waiting(p, actions);
}

/* ---- the ring ---- */
static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Respond to the requests of the last actions, under the lock.  Returns 0 or -errno. */
static int answer(struct fault_pager *p)
{
    struct ring_request answers[FAULT_SLOTS];
    uint32_t n = p->actions.nr_answers;
    double now = now_s();

    for (uint32_t i = 0; i < n; i++) {
        answers[i] = p->actions.answer[i].request;
        p->answered[p->nr_answered] = p->actions.answer[i];
        p->answered[p->nr_answered++].until = now;
    }
    return n ? p->respond(p->ring, answers, n) : 0;
}

static void add_finished(struct fault_pager *p, uint64_t pfn, int32_t result)
{
    p->finished[p->nr_finished] = pfn;
    p->results[p->nr_finished++] = result;
}

static void ask(struct fault_pager *p)
{
    uint8_t frames[FAULT_SLOTS][sizeof(p->lane.fault.bytes)];
    struct iovec vector[FAULT_SLOTS];

    for (uint32_t i = 0; i < p->actions.nr_ask; i++) {
        fault_frame_make(&p->lane.fault, p->actions.ask[i], NULL, frames[i]);
        vector[i] = (struct iovec){ frames[i], p->lane.fault.size };
    }
    if (p->actions.nr_ask)
        lane_send(&p->lane, vector, p->actions.nr_ask);
}

static int handle_ring(struct fault_pager *p)
{
    int open = lane_is_open(&p->lane), rc = 0;

    fault_lock_take(p->pages->lock);
    p->nr_requests = p->consume(p->ring, p->requests);
    if (p->nr_requests > 0 && open) {
        rc = destination_requests(p->pages, p->requests, p->nr_requests, now_s(), &p->actions);
        if (!rc)
            rc = answer(p);
    }
    fault_lock_give(p->pages->lock);
    if (!p->nr_requests)
        return 0;
    if (p->nr_requests < 0 || !open)
        return FAULT_RING;
    if (rc)
        return rc;
    ask(p);
    for (uint32_t i = 0; i < p->actions.nr_dropped; i++)
        add_finished(p, p->actions.dropped[i], -ENOENT);
    return FAULT_ASKED;
}

/* ---- the pull lane ---- */
struct arrived {
    size_t n;
    uint64_t pfns[FAULT_SLOTS];
    const void *pages[FAULT_SLOTS];     /* NULL: zeros */
    uint8_t wanted[FAULT_SLOTS];
};

/* Read the frame of one page at *at, and receive the rest of the page, which may come in several
 * packets.  Returns the pfn, or -1 if there is no such frame or the connection ends. */
static int64_t read_page(const struct fault_lane *lane, uint8_t *buffer, size_t size, long *at,
                         long *got, const void **page)
{
    long left = *got - *at;
    int64_t pfn;

    *page = NULL;
    if (left >= lane->page.size && (pfn = fault_frame_pfn(&lane->page, buffer + *at)) >= 0) {
        const uint8_t *frame = buffer + *at;

        *page = frame + lane->page.size;
        *at += lane->page.size + PAGE_BYTES;
        if (*at > (long)size || !lane_receive_up_to(lane, buffer, got, *at))
            return -1;
        if (lane->page.covers_page && !fault_frame_is_whole(&lane->page, frame, *page))
            return -1;      /* the slow path reports it */
        return pfn;
    }
    if (left >= lane->zero.size && (pfn = fault_frame_pfn(&lane->zero, buffer + *at)) >= 0) {
        *at += lane->zero.size;
        return pfn;
    }
    return -1;
}

/* Read the frames in the buffer, and receive the rest of the last one.  Returns 0 if one of them is
 * not a frame of one page. */
static int read_pages(struct fault_pager *p, uint8_t *buffer, size_t size, struct arrived *arrived)
{
    long at = 0;

    for (arrived->n = 0; at < p->received; arrived->n++) {
        int64_t pfn;

        if (arrived->n == FAULT_SLOTS)
            return 0;
        pfn = read_page(&p->lane, buffer, size, &at, &p->received, &arrived->pages[arrived->n]);
        if (pfn < 0 || (uint64_t)pfn >= p->pages->nr_pfns)
            return 0;
        arrived->pfns[arrived->n] = pfn;
    }
    return arrived->n > 0;
}

/* Returns 0 if one of the pages was never missing. */
static int claim(struct fault_pager *p, struct arrived *arrived)
{
    size_t n;

    fault_lock_take(p->pages->lock);
    n = destination_claim(p->pages, arrived->pfns, arrived->n, arrived->wanted);
    fault_lock_give(p->pages->lock);
    return n == arrived->n;
}

/* Undo the claim of the pages from number first on. */
static void unclaim(struct fault_pager *p, const struct arrived *arrived, size_t first)
{
    fault_lock_take(p->pages->lock);
    for (size_t i = first; i < arrived->n; i++)
        if (arrived->wanted[i])
            destination_unclaim(p->pages, &arrived->pfns[i], 1);
    fault_lock_give(p->pages->lock);
}

static int handle_lane(struct fault_pager *p, uint8_t *buffer, size_t size)
{
    struct arrived arrived = { .n = 0 };

    p->received = lane_receive(&p->lane, buffer, size, MSG_DONTWAIT);
    if (p->received == -EAGAIN)     /* a part of a TLS record */
        return 0;
    if (!read_pages(p, buffer, size, &arrived) || !lane_is_open(&p->lane) || !claim(p, &arrived))
        return FAULT_LANE;
    for (size_t i = 0; i < arrived.n; i++) {
        int32_t result;
        int rc;

        if (!arrived.wanted[i])
            continue;
        result = p->load(p->domain, arrived.pfns[i], arrived.pages[i]);
        if (result && result != -ENOENT) {  /* no memory: the slow path waits for memory */
            unclaim(p, &arrived, i);
            return FAULT_LANE | (p->nr_finished ? FAULT_LOADED : 0);
        }
        add_finished(p, arrived.pfns[i], result);
        fault_lock_take(p->pages->lock);
        destination_finish(p->pages, &arrived.pfns[i], &result, 1, &p->actions);
        rc = answer(p);
        fault_lock_give(p->pages->lock);
        if (rc) {
            unclaim(p, &arrived, i + 1);
            return rc;
        }
    }
    return FAULT_LOADED;
}

int fault_wait(struct fault_pager *p, void *buffer, size_t size)
{
    struct pollfd fds[3] = { { .fd = p->wake_fd, .events = POLLIN },
                             { .fd = p->ring_fd, .events = POLLIN },
                             { .fd = p->lane.fd, .events = POLLIN } };
    int rc = 0;

    p->nr_requests = p->nr_finished = p->nr_answered = p->actions.nr_ask = 0;
    while (!rc) {
        int is_buffered = lane_is_buffered(&p->lane);

        if (poll(fds, 3, is_buffered ? 0 : -1) < 0) {
            if (errno != EINTR)
                return -errno;
            continue;
        }
        /* first, because a page lets a vCPU continue */
        if (fds[2].revents || is_buffered)
            rc = handle_lane(p, buffer, size);
        if (!rc && fds[1].revents)
            rc = handle_ring(p);
        if (fds[0].revents && rc >= 0)
            rc |= FAULT_STOPPED;
    }
    return rc;
}
