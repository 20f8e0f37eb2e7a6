/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The pull lane: a connection on which both languages send. */
#include <errno.h>
#include <sys/socket.h>
#include "internal.h"

void fault_lane_open(struct fault_lane *lane)
{
    __atomic_store_n(&lane->open, 1, __ATOMIC_RELEASE);
}

int lane_is_open(const struct fault_lane *lane)
{
    return __atomic_load_n(&lane->open, __ATOMIC_ACQUIRE);
}

long lane_receive(const struct fault_lane *lane, void *buffer, size_t size, int flags)
{
    if (lane->records)
        return lane->records_receive(lane->records, buffer, size, flags);
    for (;;) {
        ssize_t got = recv(lane->fd, buffer, size, flags);

        if (got >= 0)
            return got;
        if (errno != EINTR)
            return -errno;
    }
}

int lane_receive_up_to(const struct fault_lane *lane, uint8_t *buffer, long *got, long end)
{
    while (*got < end) {
        long more = lane_receive(lane, buffer + *got, end - *got, MSG_WAITALL);

        if (more <= 0)
            return 0;   /* the next receive gets the reason */
        *got += more;
    }
    return 1;
}

int lane_is_buffered(const struct fault_lane *lane)
{
    return lane->records && lane->records_are_buffered(lane->records);
}

/* Send all of the vector unchanged.  Returns 0, or an errno. */
static int send_unchanged(struct fault_lane *lane, struct iovec *vector, size_t n)
{
    struct msghdr message = { .msg_iov = vector, .msg_iovlen = n };

    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(lane->fd, &message, MSG_NOSIGNAL);

        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        lane->sent += sent;
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (char *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= sent;
        }
    }
    return 0;
}

/* Send all of the vector over TLS.  Returns 0, or an errno. */
static int send_records(struct fault_lane *lane, const struct iovec *vector, size_t n)
{
    int rc = lane->records_send(lane->records, vector, n);

    if (rc)
        return -rc;
    for (size_t i = 0; i < n; i++)
        lane->sent += vector[i].iov_len;
    return 0;
}

int lane_send(struct fault_lane *lane, struct iovec *vector, size_t n)
{
    int error;

    fault_lock_take(lane->sending);
    error = lane->records ? send_records(lane, vector, n) : send_unchanged(lane, vector, n);
    if (error)
        lane->error = error;
    fault_lock_give(lane->sending);
    return error ? -1 : 0;
}
