/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Many pages through a socket: what the push does all day, beside threads and vCPUs that a guest waits for.
 *
 * In C because the interpreter lock is not held here, from one end of a batch to the other, and nobody waits for it while this
 * thread has given way, or was made to.
 *
 * PIECE_BYTES     A kernel without preemption (Debian's servers, most dom0s) finishes a system call before it lets a thread that
 *                 serves a fault have the CPU: with 4 MiB in one the median fault was a tenth slower.
 * GIVE_WAY_BYTES  A thread that wakes up takes the CPU from one that is not further ahead than it; between a pusher
 *                 that waits for a few microseconds now and then and a pager that is all but idle the kernel does not always
 *                 decide for the pager, and looks again at its next tick (4 ms).  So we ask it to, this often.  More often
 *                 costs more than it gives (docs/performance.md).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include "bulk_api.h"

#define PIECE_BYTES (128 << 10)
#define GIVE_WAY_BYTES (512 << 10)

static void give_way(size_t *since, size_t moved)
{
    *since += moved;
    if (*since >= GIVE_WAY_BYTES) {
        sched_yield();
        *since = 0;
    }
}

int bulk_send(int fd, const struct bulk_piece *pieces, size_t n)
{
    struct iovec vector[IOV_MAX];
    size_t since = 0, first = 0, offset = 0;  /* what is to be sent next: from there in the piece first */

    while (first < n) {
        struct msghdr message = { .msg_iov = vector };
        size_t room = PIECE_BYTES, at = offset;
        ssize_t sent;

        for (size_t i = first; i < n && room && message.msg_iovlen < IOV_MAX; i++, at = 0) {
            size_t bytes = pieces[i].bytes - at < room ? pieces[i].bytes - at : room;

            vector[message.msg_iovlen++] = (struct iovec){ (char *)pieces[i].at + at, bytes };
            room -= bytes;
        }
        sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        give_way(&since, sent);
        for (offset += sent; first < n && offset >= pieces[first].bytes; first++)
            offset -= pieces[first].bytes;
    }
    return 0;
}

long bulk_receive(int fd, void *into, size_t bytes, int is_tcp)
{
    size_t since = 0, done = 0;

    while (done < bytes) {
        size_t left = bytes - done;
        ssize_t got;

        /*
         * Because pages are acknowledged on this connection the kernel takes it for a dialogue and delays its own
         * acknowledgements by 40 ms, for which a sender with a full window waits.  Not sticky: see tcp(7).
         */
        if (is_tcp)
            setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 1 }, sizeof(int));
        got = recv(fd, (char *)into + done, left < PIECE_BYTES ? left : PIECE_BYTES, MSG_WAITALL);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (!got)
            break;
        done += got;
        give_way(&since, got);
    }
    return done;
}
