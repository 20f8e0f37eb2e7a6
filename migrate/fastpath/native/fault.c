/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The quick way of a fault: what nearly every fault is, done without the interpreter, at both ends.
 *
 *   receiver   ring -> a page that is outstanding -> "fault" on the pull lane             fault_wait
 *   sender     "fault" on the pull lane -> the page, from where it lies                   fault_serve
 *   receiver   "pages" on the pull lane -> load -> answer in the ring                     fault_wait
 *
 * A vCPU stands still for all of that, and the caches are cold: what takes Python 8 us in a loop takes 45 us once every
 * millisecond.  So Python comes after the fact here: it keeps the books when the question or the answer is on its way.
 *
 * Everything else goes the general way, in Python, and nothing is half done before it is known which way it goes: a call that meets
 * something else hands back what it has received or taken as it was.  "Else" is whatever is not byte for byte a frame
 * about one page as our own codec makes it, several pages in one message, pages that are not outstanding, drops, errors.  So
 * this file knows no msgpack and decides nothing: of the states of pages (receiver/outstanding.py, sender/backlog.py) it
 * has the few steps that a fault takes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include "ring_api.h"
#include "fault_api.h"

#define PAGE_BYTES 4096

/* ---- locks ---- */
struct fault_lock {
    pthread_mutex_t mutex;
};

struct fault_lock *fault_lock_new(void)
{
    struct fault_lock *lock = malloc(sizeof(*lock));

    if (lock)
        pthread_mutex_init(&lock->mutex, NULL);
    return lock;
}

void fault_lock_free(struct fault_lock *lock)
{
    pthread_mutex_destroy(&lock->mutex);
    free(lock);
}

void fault_lock_take(struct fault_lock *lock) { pthread_mutex_lock(&lock->mutex); }
void fault_lock_give(struct fault_lock *lock) { pthread_mutex_unlock(&lock->mutex); }

int fault_lock_is_taken(struct fault_lock *lock)
{
    if (pthread_mutex_trylock(&lock->mutex))
        return 1;
    pthread_mutex_unlock(&lock->mutex);
    return 0;
}

/* ---- frames (migrate/protocol/frames.py) ---- */
#define HEADER_SUM_AT 12
#define PREFIX_SUM_AT 16
#define HEADER_AT 20

/* Of zlib.  By half bytes: a table of 1 KiB would be out of the cache whenever a fault comes. */
static uint32_t crc32(const uint8_t *bytes, size_t n)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    uint32_t sum = ~0u;

    for (size_t i = 0; i < n; i++) {
        sum ^= bytes[i];
        sum = sum >> 4 ^ table[sum & 15];
        sum = sum >> 4 ^ table[sum & 15];
    }
    return ~sum;
}

static void put_be32(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = value >> (24 - 8 * i);
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

int64_t fault_frame_pfn(const struct fault_frame *kind, const uint8_t *frame)
{
    uint32_t behind = kind->pfn_at + 8;
    uint64_t pfn = 0;

    if (memcmp(frame, kind->bytes, HEADER_SUM_AT) || memcmp(frame + HEADER_AT, kind->bytes + HEADER_AT, kind->pfn_at - HEADER_AT) ||
        memcmp(frame + behind, kind->bytes + behind, kind->size - behind) ||
        be32(frame + PREFIX_SUM_AT) != crc32(frame, PREFIX_SUM_AT) ||
        be32(frame + HEADER_SUM_AT) != crc32(frame + HEADER_AT, kind->size - HEADER_AT))
        return -1;
    for (int i = 7; i >= 0; i--)
        pfn = pfn << 8 | frame[kind->pfn_at + i];
    return pfn > INT64_MAX ? -1 : (int64_t)pfn;
}

void fault_frame_make(const struct fault_frame *kind, uint64_t pfn, uint8_t *frame)
{
    memcpy(frame, kind->bytes, kind->size);
    for (int i = 0; i < 8; i++)
        frame[kind->pfn_at + i] = pfn >> 8 * i;
    put_be32(frame + HEADER_SUM_AT, crc32(frame + HEADER_AT, kind->size - HEADER_AT));
    put_be32(frame + PREFIX_SUM_AT, crc32(frame, PREFIX_SUM_AT));
}

/* ---- the lane ---- */
void fault_lane_open(struct fault_lane *lane)
{
    __atomic_store_n(&lane->open, 1, __ATOMIC_RELEASE);
}

static int is_open(const struct fault_lane *lane)
{
    return __atomic_load_n(&lane->open, __ATOMIC_ACQUIRE);
}

static long receive(int fd, void *buffer, size_t size, int flags)
{
    for (;;) {
        ssize_t got = recv(fd, buffer, size, flags);

        if (got >= 0)
            return got;
        if (errno != EINTR)
            return -errno;
    }
}

/* Returns 0, or -1 with lane->error set. */
static int send_all(struct fault_lane *lane, struct iovec *vector, size_t n)
{
    struct msghdr message = { .msg_iov = vector, .msg_iovlen = n };
    int rc = 0;

    fault_lock_take(lane->sending);
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(lane->fd, &message, MSG_NOSIGNAL);

        if (sent < 0) {
            if (errno == EINTR)
                continue;
            lane->error = errno;
            rc = -1;
            break;
        }
        lane->sent += sent;
        for (; message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len; message.msg_iov++, message.msg_iovlen--)
            sent -= message.msg_iov->iov_len;
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= sent;
        }
    }
    fault_lock_give(lane->sending);
    return rc;
}

/* ---- the sender ---- */
enum { NOT_OURS, UNSENT, SENT, DONE };      /* sender/backlog.py */
#define BLOCK 4096
enum { PAGE_DATA, PAGE_ZERO };              /* PageStatus in xenbackend/pages.py */

struct wanted {
    uint64_t pfn;
    const void *page;       /* NULL: zeros */
    int skip;
};

/* Backlog.fault().  Returns 0, having done nothing, where one of them was never missing. */
static int take(struct fault_source *s, struct wanted *wanted, int n)
{
    int all = 1;

    fault_lock_take(s->lock);
    for (int i = 0; i < n; i++)
        all &= s->state[wanted[i].pfn] != NOT_OURS;
    for (int i = 0; all && i < n; i++) {
        uint64_t pfn = wanted[i].pfn;

        wanted[i].skip = s->state[pfn] == DONE;     /* it had crossed the fault */
        if (wanted[i].skip)
            continue;
        if (s->state[pfn] == UNSENT) {
            s->state[pfn] = SENT;
            s->left[pfn / BLOCK]--;
            --*s->unsent;
        }
        *s->cursor = (pfn + 1) % s->nr_pfns;
    }
    fault_lock_give(s->lock);
    return all;
}

/* Returns how many, 0 where what has come is not faults alone. */
static int read_faults(const struct fault_source *s, const uint8_t *buffer, long got, struct wanted *wanted)
{
    uint32_t size = s->lane.fault.size;
    int n = got / size;

    if (got <= 0 || got % size || n > FAULT_SLOTS)
        return 0;
    for (int i = 0; i < n; i++) {
        int64_t pfn = fault_frame_pfn(&s->lane.fault, buffer + i * size);

        if (pfn < 0 || (uint64_t)pfn >= s->nr_pfns)
            return 0;
        wanted[i] = (struct wanted){ .pfn = pfn };
    }
    return n;
}

/* Returns 0 where one of them is neither data nor zeros. */
static int look(const struct fault_source *s, struct wanted *wanted, int n)
{
    for (int i = 0; i < n; i++) {
        int status = s->look(s->domain, wanted[i].pfn, &wanted[i].page);

        if (status != PAGE_DATA)
            wanted[i].page = NULL;
        if (status != PAGE_DATA && status != PAGE_ZERO)
            return 0;
    }
    return 1;
}

static int send_page(struct fault_source *s, const struct wanted *wanted)
{
    const struct fault_frame *kind = wanted->page ? &s->lane.page : &s->lane.zero;
    uint8_t head[sizeof(kind->bytes)];
    struct iovec vector[2] = { { head, kind->size }, { (void *)wanted->page, PAGE_BYTES } };

    fault_frame_make(kind, wanted->pfn, head);
    if (send_all(&s->lane, vector, wanted->page ? 2 : 1))
        return -1;
    s->pages++;
    s->zeros += !wanted->page;
    return 0;
}

long fault_serve(struct fault_source *s, void *buffer, size_t size, int wait)
{
    for (;;) {
        struct wanted wanted[FAULT_SLOTS];
        long got = receive(s->lane.fd, buffer, size, wait ? 0 : MSG_DONTWAIT);
        int n = is_open(&s->lane) ? read_faults(s, buffer, got, wanted) : 0, ours, failed = 0;

        if (!n)
            return got;
        ours = look(s, wanted, n) && take(s, wanted, n);
        for (int i = 0; i < n; i++) {
            if (ours && !failed && !wanted[i].skip)
                failed = send_page(s, &wanted[i]);
            if (s->looked && wanted[i].page)
                s->looked(s->domain, wanted[i].page);
        }
        if (!ours || failed)
            return failed ? 0 : got;
    }
}

/* ---- the receiver ---- */
enum { PRESENT, OUTSTANDING, REQUESTED, LOADING, READY, DROPPED };      /* receiver/outstanding.py */
#define MEM_PAGING_DROP_PAGE 1
#define MEM_PAGING_EVICT_FAIL 2

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Requests for pages that are to come: wait for them.  Returns how many are to be asked for, or -1, having done nothing.  Locked. */
static int wait_for(struct fault_pager *p, uint64_t *ask)
{
    uint64_t now = now_ns();
    int n = 0;

    for (int i = 0; i < p->nr_requests; i++) {
        const struct ring_request *r = &p->requests[i];

        if (r->paging_flags & (MEM_PAGING_DROP_PAGE | MEM_PAGING_EVICT_FAIL) || r->gfn >= p->nr_pfns ||
            (p->state[r->gfn] != OUTSTANDING && p->state[r->gfn] != REQUESTED))
            n = -1;
    }
    if (p->nr_waiting + p->nr_requests > FAULT_SLOTS)
        n = -1;
    for (int i = 0; !(n < 0) && i < p->nr_requests; i++) {
        uint64_t pfn = p->requests[i].gfn;

        p->waiting[p->nr_waiting++] = (struct fault_waiting){ .request = p->requests[i], .since_ns = now };
        if (p->state[pfn] == OUTSTANDING) {
            p->state[pfn] = REQUESTED;
            ask[n++] = pfn;
        }
    }
    return n;
}

static int handle_ring(struct fault_pager *p)
{
    uint8_t frames[FAULT_SLOTS][sizeof(p->lane.fault.bytes)];
    struct iovec vector[FAULT_SLOTS];
    uint64_t ask[FAULT_SLOTS];
    int n = -1;

    fault_lock_take(p->lock);       /* the notes of what is open are shared with whoever answers */
    p->nr_requests = p->consume(p->ring, p->requests);
    if (p->nr_requests > 0 && is_open(&p->lane))
        n = wait_for(p, ask);
    fault_lock_give(p->lock);
    if (!p->nr_requests)
        return 0;
    if (n < 0)
        return FAULT_RING;
    for (int i = 0; i < n; i++) {
        fault_frame_make(&p->lane.fault, ask[i], frames[i]);
        vector[i] = (struct iovec){ frames[i], p->lane.fault.size };
    }
    p->asked = n;
    if (n)
        send_all(&p->lane, vector, n);
    return FAULT_ASKED;
}

int fault_answer(struct fault_pager *p)
{
    struct ring_request answers[FAULT_SLOTS];
    uint64_t now = now_ns();
    uint32_t left = 0;
    int n = 0;

    for (uint32_t i = 0; i < p->nr_waiting; i++) {
        if (p->state[p->waiting[i].request.gfn] < READY) {
            p->waiting[left++] = p->waiting[i];
            continue;
        }
        answers[n++] = p->waiting[i].request;
        if (p->nr_answered < sizeof(p->answered) / sizeof(p->answered[0])) {
            p->answered[p->nr_answered] = p->waiting[i];
            p->answered[p->nr_answered++].until_ns = now;
        }
    }
    p->nr_waiting = left;
    return n ? p->respond(p->ring, answers, n) : 0;
}

struct arrived {
    uint64_t pfn;
    const void *page;
    int wanted;
};

/* The rest of a page that has begun to come: where packets are small it comes in several.  Returns 0 where it does not come. */
static int receive_up_to(int fd, uint8_t *buffer, long *got, long end)
{
    while (*got < end) {
        long more = receive(fd, buffer + *got, end - *got, MSG_WAITALL);

        if (more <= 0)
            return 0;   /* whoever receives next sees why */
        *got += more;
    }
    return 1;
}

/* Returns how many pages the frames in the buffer bring, all of the last one by then, or 0 where they are not all of this kind. */
static int read_pages(const struct fault_pager *p, uint8_t *buffer, long *got, size_t size, struct arrived *arrived)
{
    const struct fault_lane *lane = &p->lane;
    int n = 0;

    for (long at = 0; at < *got; n++) {
        int64_t pfn;

        if (n == FAULT_SLOTS)
            return 0;
        if (*got - at >= lane->page.size && (pfn = fault_frame_pfn(&lane->page, buffer + at)) >= 0) {
            const uint8_t *page = buffer + at + lane->page.size;

            at += lane->page.size + PAGE_BYTES;
            if (at > (long)size || !receive_up_to(lane->fd, buffer, got, at))
                return 0;
            arrived[n] = (struct arrived){ .pfn = pfn, .page = page };
        } else if (*got - at >= lane->zero.size && (pfn = fault_frame_pfn(&lane->zero, buffer + at)) >= 0) {
            at += lane->zero.size;
            arrived[n] = (struct arrived){ .pfn = pfn };
        } else {
            return 0;
        }
        if ((uint64_t)pfn >= p->nr_pfns)
            return 0;
    }
    return n;
}

/* OutstandingPages.claim().  Returns 0, having done nothing, where one of them was never missing. */
static int claim(struct fault_pager *p, struct arrived *arrived, int n)
{
    int all = 1;

    fault_lock_take(p->lock);
    for (int i = 0; i < n; i++)
        all &= p->state[arrived[i].pfn] != PRESENT;
    for (int i = 0; all && i < n; i++) {
        uint8_t *state = &p->state[arrived[i].pfn];

        arrived[i].wanted = *state == OUTSTANDING || *state == REQUESTED;
        if (arrived[i].wanted)
            *state = LOADING;
    }
    fault_lock_give(p->lock);
    return all;
}

static void unclaim(struct fault_pager *p, const struct arrived *arrived, int n)
{
    fault_lock_take(p->lock);
    for (int i = 0; i < n; i++)
        if (arrived[i].wanted)
            p->state[arrived[i].pfn] = REQUESTED;
    fault_lock_give(p->lock);
}

static int handle_lane(struct fault_pager *p, uint8_t *buffer, size_t size)
{
    struct arrived arrived[FAULT_SLOTS];
    int n, rc = 0;

    p->received = receive(p->lane.fd, buffer, size, 0);
    n = read_pages(p, buffer, &p->received, size, arrived);
    if (!n || !is_open(&p->lane) || !claim(p, arrived, n))
        return FAULT_LANE;
    for (int i = 0; i < n; i++) {
        int result;

        if (!arrived[i].wanted)
            continue;
        result = p->load(p->domain, arrived[i].pfn, arrived[i].page);
        if (result && result != -ENOENT) {  /* no memory: the general way has patience */
            unclaim(p, arrived + i, n - i);
            return FAULT_LANE | (p->nr_loaded ? FAULT_LOADED : 0);
        }
        p->loaded[p->nr_loaded] = arrived[i].pfn;
        p->results[p->nr_loaded++] = result;
        fault_lock_take(p->lock);
        p->state[arrived[i].pfn] = result ? DROPPED : READY;
        rc = fault_answer(p);
        fault_lock_give(p->lock);
        if (rc)
            return rc;
    }
    return FAULT_LOADED;
}

int fault_wait(struct fault_pager *p, void *buffer, size_t size)
{
    struct pollfd fds[3] = { { .fd = p->wake_fd, .events = POLLIN }, { .fd = p->ring_fd, .events = POLLIN },
                             { .fd = p->lane.fd, .events = POLLIN } };
    int rc = 0;

    p->nr_requests = p->nr_loaded = p->asked = 0;
    while (!rc) {
        if (poll(fds, 3, -1) < 0) {
            if (errno != EINTR)
                return -errno;
            continue;
        }
        if (fds[2].revents)     /* first: a vCPU goes on by it, and what the ring holds asks for more */
            rc = handle_lane(p, buffer, size);
        if (!rc && fds[1].revents)
            rc = handle_ring(p);
        if (fds[0].revents && rc >= 0)
            rc |= FAULT_STOPPED;
    }
    return rc;
}
