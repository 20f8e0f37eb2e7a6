/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Many pages through a socket: the bulk of the push, beside threads and vCPUs that a guest waits
 * for.
 *
 * This is in C so that the interpreter lock is not held from the beginning of a batch to its end.
 * No thread waits for the lock while this thread yields or is preempted.
 *
 *   PIECE_BYTES     A kernel without preemption (Debian's servers, most dom0s) finishes a system
 *                   call before it gives the CPU to a thread that serves a fault.  With 4 MiB in
 *                   one call the median fault was a tenth slower.
 *   YIELD_BYTES     A thread that wakes up preempts another one only if it has not used more than
 *                   its share of the CPU (EEVDF).  A pager has just run and a pusher waits now and
 *                   then, so the kernel does not always choose the pager.  It chooses again at its
 *                   next tick (4 ms).  Therefore this thread yields after so many bytes.  To yield
 *                   more often costs more than it saves (docs/performance.md).
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
#define YIELD_BYTES (512 << 10)

static void yield_cpu(size_t *since, size_t moved)
{
    *since += moved;
    if (*since >= YIELD_BYTES) {
        sched_yield();
        *since = 0;
    }
}

int bulk_send(int fd, const struct bulk_piece *pieces, size_t n)
{
    struct iovec vector[IOV_MAX];
    /* the next bytes to send begin at offset, in the piece first; since: bytes since a yield */
    size_t since = 0, first = 0, offset = 0;

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
        yield_cpu(&since, sent);
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
         * Because pages are acknowledged on this connection, the kernel treats it as a dialogue and
         * delays its own acknowledgements by 40 ms.  A sender with a full window waits for them.
         * The option is not sticky: see tcp(7).
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
        yield_cpu(&since, got);
    }
    return done;
}
