/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The fast path of a fault at both ends (migrate/fastpath/native): what a peer sends on the pull
 * lane, in packets of any size, and what the ring and the hypervisor answer meanwhile.
 *
 * Because of the checksums a fuzzer cannot make frames by chance.  So the input determines which
 * frames to make, of which pfns, how they are damaged and whether their checksums are corrected
 * after that.  kinds.h is generated: the three kinds of frame as the codec makes them.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sanitizer/asan_interface.h>
#include <sys/socket.h>
#include "input.h"

static ssize_t fuzzed_recv(int fd, void *buffer, size_t size, int flags);
static ssize_t fuzzed_sendmsg(int fd, const struct msghdr *message, int flags);
static int fuzzed_poll(struct pollfd *fds, nfds_t n, int timeout);
#define recv fuzzed_recv
#define sendmsg fuzzed_sendmsg
#define poll fuzzed_poll
#include "../../../../migrate/fastpath/native/lock.c"
#include "../../../../migrate/fastpath/native/checksum.c"
#include "../../../../migrate/fastpath/native/frame.c"
#include "../../../../migrate/fastpath/native/lane.c"
#include "../../../../migrate/fastpath/native/source.c"
#include "../../../../migrate/fastpath/native/destination.c"
#include "kinds.h"

#define STREAM_BYTES (64 << 10)
#define MOST_PFNS 64

static uint8_t *stream; /* the bytes that the peer sends */
static size_t stream_bytes, stream_at;
static uint8_t *buffer; /* the buffer into which they are received */
static size_t buffer_bytes;
static struct fault_frame kinds[] = { FAULT_KIND, PAGE_KIND, ZERO_KIND };

/* ---- the peer ---- */
static void append(const uint8_t *bytes, size_t n)
{
    if (stream_bytes + n > STREAM_BYTES)
        n = STREAM_BYTES - stream_bytes;
    memcpy(stream + stream_bytes, bytes, n);
    stream_bytes += n;
}

static void append_frame(unsigned choice)
{
    static const uint8_t contents[PAGE_BYTES] = { 1 };
    const struct fault_frame *kind = &kinds[choice % 3];
    uint64_t pfn =
        choice & 4 ? take_byte() % (MOST_PFNS + 1) : (uint64_t)take_u32() << take_byte() % 40;
    uint8_t *frame = exactly(kind->size);
    int64_t read;

    fault_frame_make(kind, pfn, contents, frame);
    CHECK(fault_frame_pfn(kind, frame) == (pfn > INT64_MAX ? -1 : (int64_t)pfn));
    if (choice & 8)
        for (int left = 1 + take_byte() % 4; left; left--)
            frame[take_byte() % kind->size] = take_byte();
    if (choice & 16) {
        put_be32(frame + HEADER_SUM_AT, header_sum(kind, frame, contents));
        put_be32(frame + PREFIX_SUM_AT, fault_checksum(0, frame, PREFIX_SUM_AT));
    }
    read = fault_frame_pfn(kind, frame);
    /* The frame is then byte for byte as our codec makes it. */
    if (read >= 0 && fault_frame_is_whole(kind, frame, contents)) {
        uint8_t *again = exactly(kind->size);

        fault_frame_make(kind, read, contents, again);
        CHECK(!memcmp(again, frame, kind->size));
        free(again);
    }
    append(frame, choice & 32 ? take_byte() % (kind->size + 1) : kind->size);
    if (kind == &kinds[1] && !(choice & 64))
        append(contents, choice & 128 ? take_u32() % PAGE_BYTES : PAGE_BYTES);
    free(frame);
}

static void make_stream(void)
{
    stream_bytes = stream_at = 0;
    for (int left = take_byte() % 24; left; left--) {
        uint8_t choice = take_byte();

        if (choice == 0xff) {
            uint8_t raw[32];

            take_bytes(raw, sizeof(raw));
            append(raw, sizeof(raw));
        } else {
            append_frame(choice);
        }
    }
}

static ssize_t fuzzed_recv(int fd, void *into, size_t size, int flags)
{
    size_t now = stream_bytes - stream_at < size ? stream_bytes - stream_at : size;
    uint8_t piece = flags & MSG_WAITALL ? 0 : take_byte();

    (void)fd;
    CHECK((uint8_t *)into >= buffer && (uint8_t *)into + size <= buffer + buffer_bytes);
    if (piece == 1 || (piece == 2 && flags & MSG_DONTWAIT)) {
        errno = piece == 1 ? EINTR : EAGAIN;
        return -1;
    }
    if (piece && piece < now)
        now = piece;
    ASAN_UNPOISON_MEMORY_REGION(buffer, buffer_bytes);
    memcpy(into, stream + stream_at, now);
    stream_at += now;
    /* Bytes that have not been received must not be read. */
    ASAN_POISON_MEMORY_REGION((uint8_t *)into + now, buffer + buffer_bytes - (uint8_t *)into - now);
    return now;
}

static ssize_t fuzzed_sendmsg(int fd, const struct msghdr *message, int flags)
{
    uint8_t piece = take_byte();
    ssize_t sent = 0;

    (void)fd;
    (void)flags;
    if (piece == 1 || piece == 2) {
        errno = piece == 1 ? EINTR : EPIPE;
        return -1;
    }
    for (size_t i = 0; i < message->msg_iovlen; i++) {
        const struct iovec *part = &message->msg_iov[i];
        uint8_t *copy = exactly(part->iov_len);

        memcpy(copy, part->iov_base, part->iov_len);
        free(copy);
        sent += part->iov_len;
    }
    return piece > 128 && piece < sent ? piece : sent;
}

/* ---- this end's memory ---- */
static uint8_t *memory_page;
static int looking;
static uint8_t loads[MOST_PFNS];

static int look_at(void *domain, uint64_t pfn, const void **page)
{
    int status = pfn % 5 == 4 ? 4 : pfn % 2 ? PAGE_DATA : PAGE_ZERO;

    CHECK(pfn < ((struct fault_source *)domain)->pages->nr_pfns);
    *page = memory_page;
    looking += status == PAGE_DATA;
    return status;
}

static void looked_at(void *domain, const void *page)
{
    (void)domain;
    CHECK(page == memory_page && looking-- > 0);
}

static int load(void *domain, uint64_t pfn, const void *page)
{
    struct fault_pager *p = domain;
    uint8_t result = take_byte();

    CHECK(pfn < p->pages->nr_pfns && p->pages->state[pfn] == PAGE_LOADING);
    if (page)
        CHECK(!memcmp(page, page, PAGE_BYTES));
    if (result == 1)
        return -ENOMEM;
    CHECK(!loads[pfn]++); /* a page is loaded at most once */
    return result == 2 ? -ENOENT : 0;
}

/* ---- the ring ---- */
static unsigned asked, answered;

static int consume(void *ring, struct ring_request *out)
{
    struct fault_pager *p = ring;
    int n = take_byte() % (FAULT_SLOTS + 2);

    if (n == FAULT_SLOTS + 1)
        return -EPROTO;
    if (n > (int)(FAULT_SLOTS - (asked - answered)))
        n = FAULT_SLOTS - (asked - answered);
    for (int i = 0; i < n; i++)
        out[i] = (struct ring_request){ .gfn = take_byte() % (p->pages->nr_pfns + 1),
                                        .paging_flags = take_byte() % 8 };
    asked += n;
    return n;
}

/* Check that the page is present or gone, unless the request needs no page. */
static int respond(void *ring, const struct ring_request *answers, int n)
{
    struct fault_pager *p = ring;

    CHECK(n > 0 && n <= FAULT_SLOTS);
    for (int i = 0; i < n; i++) {
        int state = state_of(p->pages, answers[i].gfn);

        CHECK(state == PAGE_PRESENT || state >= PAGE_READY ||
              answers[i].paging_flags & MEM_PAGING_DROP_PAGE);
    }
    answered += n;
    CHECK(answered <= asked);
    return take_byte() == 1 ? -EPROTO : 0;
}

static int fuzzed_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    uint8_t choice = take_byte();

    (void)n;
    (void)timeout;
    for (int i = 0; i < 3; i++)
        fds[i].revents = choice >> i & 1 ? POLLIN : 0;
    if (!input_left)
        fds[0].revents = POLLIN;
    return 3;
}

/* ---- both ends ---- */
static void prepare_lane(struct fault_lane *lane, uint8_t flags)
{
    lane->sending = fault_lock_new();
    lane->fault = kinds[0];
    lane->page = kinds[1];
    lane->zero = kinds[2];
    if (flags & 2)
        fault_lane_open(lane);
    buffer_bytes = flags & 4 ? 16 << 10 : 1 + take_u32() % (10 << 10);
    if (flags & 8)      /* hardly room for a page */
        buffer_bytes = lane->page.size + PAGE_BYTES + 1 - take_byte() % 4;
    buffer = exactly(buffer_bytes);
}

static void serve(uint8_t flags)
{
    uint64_t nr_pfns = 1 + take_byte() % MOST_PFNS;
    struct source_pages pages = { .nr_pfns = nr_pfns };
    struct fault_source s = { .look = look_at, .looked = looked_at, .pages = &pages };
    int64_t left;

    prepare_lane(&s.lane, flags);
    s.domain = &s;
    pages.lock = fault_lock_new();
    pages.state = exactly(nr_pfns);
    for (uint64_t i = 0; i < nr_pfns; i++) {
        pages.state[i] = take_byte() % 4;
        pages.unsent += pages.state[i] == PAGE_UNSENT;
    }
    left = pages.unsent;
    pages.left = &left;
    memory_page = exactly(PAGE_BYTES);
    looking = 0;
    for (int turns = 0; turns < 8; turns++) {
        long got = fault_serve(&s, buffer, buffer_bytes, 1);
        int64_t counted = 0;

        CHECK(!looking);
        CHECK(got <= (long)buffer_bytes);
        for (uint64_t i = 0; i < nr_pfns; i++)
            counted += pages.state[i] == PAGE_UNSENT;
        CHECK(counted == pages.unsent && counted == left && pages.cursor < nr_pfns);
        if (got <= 0)
            break;
    }
    free(memory_page);
    free(pages.state);
    fault_lock_free(pages.lock);
    fault_lock_free(s.lane.sending);
}

static void wait_for_pages(uint8_t flags)
{
    struct fault_pager *p = exactly(sizeof(*p));
    struct destination_pages *pages = exactly(sizeof(*pages));

    prepare_lane(&p->lane, flags);
    p->ring = p->domain = p;
    p->consume = consume;
    p->respond = respond;
    p->load = load;
    p->pages = pages;
    pages->lock = fault_lock_new();
    pages->nr_pfns = 1 + take_byte() % MOST_PFNS;
    pages->state = exactly(pages->nr_pfns);
    for (uint64_t i = 0; i < pages->nr_pfns; i++)
        pages->state[i] = take_byte() % 3;
    memset(loads, 0, sizeof(loads));
    asked = answered = 0;
    for (int turns = 0; turns < 16; turns++) {
        int rc = fault_wait(p, buffer, buffer_bytes);

        CHECK(p->nr_finished <= FAULT_SLOTS && p->nr_answered <= FAULT_SLOTS &&
              p->received <= (long)buffer_bytes);
        CHECK(rc < 0 || rc & FAULT_RING || pages->nr_waiting == asked - answered);
        for (uint32_t i = 0; i < pages->nr_waiting; i++) /* no request waits for a present page */
            CHECK(pages->state[pages->waiting[i].request.gfn] == PAGE_REQUESTED);
        if (rc < 0 || rc & (FAULT_STOPPED | FAULT_RING) || (rc & FAULT_LANE && p->received <= 0))
            break;
    }
    free(pages->state);
    fault_lock_free(pages->lock);
    fault_lock_free(p->lane.sending);
    free(pages);
    free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t flags;

    input = data;
    input_left = size;
    stream = exactly(STREAM_BYTES);
    flags = take_byte();
    kinds[1].covers_page = flags >> 4 & 1;
    make_stream();
    if (flags & 1)
        serve(flags);
    else
        wait_for_pages(flags);
    ASAN_UNPOISON_MEMORY_REGION(buffer, buffer_bytes);
    free(buffer);
    free(stream);
    return 0;
}
