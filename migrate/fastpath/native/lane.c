/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The pull lane: a socket on which both languages send. */
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

long lane_receive(int fd, void *buffer, size_t size, int flags)
{
    for (;;) {
        ssize_t got = recv(fd, buffer, size, flags);

        if (got >= 0)
            return got;
        if (errno != EINTR)
            return -errno;
    }
}

int lane_receive_up_to(int fd, uint8_t *buffer, long *got, long end)
{
    while (*got < end) {
        long more = lane_receive(fd, buffer + *got, end - *got, MSG_WAITALL);

        if (more <= 0)
            return 0;   /* the next receive gets the reason */
        *got += more;
    }
    return 1;
}

int lane_send(struct fault_lane *lane, struct iovec *vector, size_t n)
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
    fault_lock_give(lane->sending);
    return rc;
}
