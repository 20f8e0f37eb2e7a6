/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What Python sees of records.c (this file is read by cffi as well). */

/* A TLS connection.  One thread may send while another one receives. */
struct records;

/* Note which SSL object this thread makes next.  Returns 0, or -ENOMEM. */
int records_watch(void);

/*
 * Take over the SSL object that this thread has made since records_watch(), which belongs to this
 * non-blocking socket.  The socket may be of TCP, and has to stay open until records_close().
 * Returns NULL if there is no such object, because its maker uses another copy of OpenSSL, or if
 * there is no memory.
 */
struct records *records_take(int fd, int is_tcp);
void records_free(struct records *records);

/* How long the peer may take nothing before a send fails with -EAGAIN. */
void records_set_send_timeout(struct records *records, int milliseconds);

/* From here on nothing is received, as at the connection's end.  A thread that waits returns when
 * the socket is shut down.  Sending stays possible, which OpenSSL forbids after it has read the end
 * of a connection. */
void records_stop_receiving(struct records *records);

/* To be called before the socket is closed, while no other call is in progress.  Each later call
 * fails with -EBADF, because somebody else may have the number of the descriptor then. */
void records_close(struct records *records);

/* Send pieces of memory, one after the other.  Returns 0, or -errno; some bytes may have been sent
 * then, and each later call fails likewise.  -EPROTO: records_problem() has the reason. */
int records_send(struct records *records, const struct iovec *pieces, size_t n);

/*
 * Receive some bytes.  flags: MSG_WAITALL to receive all of them, or MSG_DONTWAIT.  Returns their
 * number, which is 0 (with MSG_WAITALL: smaller) at the connection's end, or -errno as
 * records_send() does; -EAGAIN if nothing has arrived.
 */
long records_receive(struct records *records, void *into, size_t bytes, int flags);

/* Whether bytes can be received although the socket may not be readable. */
int records_are_buffered(struct records *records);

/* OpenSSL's reason for each -EPROTO, in its own words. */
const char *records_problem(struct records *records);
