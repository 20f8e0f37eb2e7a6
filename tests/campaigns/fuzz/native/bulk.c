/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Many pages through a socket (migrate/lanes/native/bulk.c): pieces of any size over a connection
 * that sends and receives any number of bytes at once. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include "input.h"

static ssize_t fuzzed_sendmsg(int fd, const struct msghdr *message, int flags);
static ssize_t fuzzed_recv(int fd, void *buffer, size_t size, int flags);
#define sendmsg fuzzed_sendmsg
#define recv fuzzed_recv
#define sched_yield() ((void)0)
#include "../../../../migrate/lanes/native/bulk.c"

static uint8_t *stream;
static size_t stream_at, stream_bytes;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* How much of so many bytes the kernel moves; 0: interrupted, or an error. */
static size_t moved(size_t bytes)
{
    uint8_t choice = input_left ? take_byte() : 0xff;

    if (choice < 4) {
        errno = choice ? EINTR : ECONNRESET;
        return 0;
    }
    return choice > 200 ? bytes : least(bytes, choice);
}

static ssize_t fuzzed_sendmsg(int fd, const struct msghdr *message, int flags)
{
    size_t bytes = 0, left;

    (void)fd;
    (void)flags;
    CHECK(message->msg_iovlen <= IOV_MAX);
    for (size_t i = 0; i < message->msg_iovlen; i++)
        bytes += message->msg_iov[i].iov_len;
    if (!bytes)
        return 0;
    left = moved(bytes);
    if (!left)
        return -1;
    bytes = left;
    for (size_t i = 0; left; i++) {
        size_t now = least(left, message->msg_iov[i].iov_len);

        CHECK(stream_at + now <= stream_bytes);
        memcpy(stream + stream_at, message->msg_iov[i].iov_base, now);
        stream_at += now;
        left -= now;
    }
    return bytes;
}

static ssize_t fuzzed_recv(int fd, void *buffer, size_t size, int flags)
{
    size_t now = least(size, stream_bytes - stream_at);

    (void)fd;
    (void)flags;
    if (!now)
        return 0;
    now = moved(now);
    if (!now)
        return -1;
    memcpy(buffer, stream + stream_at, now);
    stream_at += now;
    return now;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bulk_piece *pieces;
    size_t n, want = 0;
    uint8_t *from, *into;
    long got;
    int rc;

    input = data;
    input_left = size;
    n = take_byte() < 250 ? take_byte() % 16 : IOV_MAX + take_byte();
    pieces = exactly(n * sizeof(*pieces));
    for (size_t i = 0; i < n; i++) {
        pieces[i].bytes = n > 16 ? i % 3 : take_u32() % (300 << 10) >> take_byte() % 20;
        want += pieces[i].bytes;
    }
    from = exactly(want);
    into = exactly(want);
    for (size_t i = 0, at = 0; i < n; at += pieces[i++].bytes) {
        pieces[i].at = from + at;
        memset(from + at, (int)i + 1, pieces[i].bytes);
    }
    stream = exactly(want);
    stream_bytes = want;
    stream_at = 0;
    rc = bulk_send(0, pieces, n);
    CHECK(rc == -ECONNRESET ||
          (!rc && stream_at == want && (!want || !memcmp(stream, from, want))));
    stream_bytes = stream_at; /* the connection ends there */
    stream_at = 0;
    got = bulk_receive(0, into, want, 0);
    CHECK(got == -ECONNRESET ||
          ((size_t)got == stream_bytes && (!got || !memcmp(into, from, got))));
    free(stream);
    free(into);
    free(from);
    free(pieces);
    return 0;
}
