/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What Python sees of bulk.c (this file is read by cffi as well). */

struct bulk_piece {
    const void *at;
    size_t bytes;
};

/* Send pieces of memory, one after the other, on a blocking socket.  Returns 0, or -errno; some
 * bytes may have been sent then. */
int bulk_send(int fd, const struct bulk_piece *pieces, size_t n);

/* Receive bytes from a blocking socket, which may be of TCP.  Returns the number of bytes, which is
 * smaller at the connection's end, or -errno. */
long bulk_receive(int fd, void *into, size_t bytes, int is_tcp);
