/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The records of a TLS connection, by OpenSSL's SSL_read and SSL_write, without the interpreter
 * lock.
 *
 * Python's ssl module makes the connection, does the handshake and judges the peer's certificate.
 * After that only this code sends and receives.  Python has no function that returns its SSL
 * object.  OpenSSL reports each SSL object that is made in this process, with the thread that makes
 * it, to whoever has registered an index for application data (CRYPTO_get_ex_new_index(3)).  If
 * Python has a copy of OpenSSL of its own, nothing is reported here, and Python sends and receives
 * as well (migrate/lanes/records.py).
 *
 * An SSL object must not be used by two threads at once (openssl-threads(7)).  The socket does not
 * block, and no thread holds the lock while it waits for the socket.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include "records_api.h"

#define RECORD_BYTES SSL3_RT_MAX_PLAIN_LENGTH
#ifndef RECORDS_PER_KEY
#define RECORDS_PER_KEY (1 << 23)   /* AES-GCM stays safe for 23.7 million (RFC 8446, 5.5) */
#endif
#define AHEAD_BYTES (256 << 10)     /* that one read takes from the socket, if they are there */
#define ACK_BYTES (128 << 10)       /* between two acknowledgements, as in bulk.c */
#define YIELD_BYTES (512 << 10)     /* between two yields: bulk.c has the reason */

struct records {
    SSL *ssl;
    pthread_mutex_t next;       /* held while mutex is waited for */
    pthread_mutex_t mutex;      /* of ssl, problem and is_stopped */
    const char *problem;        /* OpenSSL can do nothing with the connection after that */
    int is_stopped;             /* for the thread that receives */
    int fd, is_tcp, send_timeout_ms;
    /* of the thread that sends: */
    int broken;                 /* -errno, after which a part of a record may have been sent */
    unsigned under_key;         /* records */
};

/* ---- the connection that Python makes ---- */
static __thread struct {
    int watching;
    SSL *ssl;
} made;

static pthread_once_t registered = PTHREAD_ONCE_INIT;
static int index_of_ssl = -1;

static void note_ssl(void *parent, void *ptr, CRYPTO_EX_DATA *data, int index, long argl,
                     void *argp)
{
    (void)ptr, (void)data, (void)index, (void)argl, (void)argp;
    if (made.watching)
        made.ssl = parent;
}

static void forget_ssl(void *parent, void *ptr, CRYPTO_EX_DATA *data, int index, long argl,
                       void *argp)
{
    (void)ptr, (void)data, (void)index, (void)argl, (void)argp;
    if (made.ssl == parent)
        made.ssl = NULL;
}

static void register_index(void)
{
    index_of_ssl = SSL_get_ex_new_index(0, NULL, note_ssl, NULL, forget_ssl);
}

int records_watch(void)
{
    pthread_once(&registered, register_index);
    made.watching = 1;
    made.ssl = NULL;
    return index_of_ssl < 0 ? -ENOMEM : 0;
}

struct records *records_take(int fd, int is_tcp)
{
    SSL *ssl = made.ssl;
    struct records *records;

    made.watching = 0;
    made.ssl = NULL;
    if (!ssl || SSL_get_fd(ssl) != fd)
        return NULL;
    records = calloc(1, sizeof(*records));
    if (!records)
        return NULL;
    SSL_up_ref(ssl);
    /* Otherwise OpenSSL reads two times for each record: its head, then the rest. */
    SSL_set_read_ahead(ssl, 1);
    SSL_set_default_read_buffer_len(ssl, AHEAD_BYTES);
    records->ssl = ssl;
    records->fd = fd;
    records->is_tcp = is_tcp;
    records->send_timeout_ms = -1;
    pthread_mutex_init(&records->next, NULL);
    pthread_mutex_init(&records->mutex, NULL);
    return records;
}

void records_free(struct records *records)
{
    SSL_free(records->ssl);
    pthread_mutex_destroy(&records->mutex);
    pthread_mutex_destroy(&records->next);
    free(records);
}

void records_stop_receiving(struct records *records)
{
    pthread_mutex_lock(&records->mutex);
    records->is_stopped = 1;
    pthread_mutex_unlock(&records->mutex);
}

void records_set_send_timeout(struct records *records, int milliseconds)
{
    records->send_timeout_ms = milliseconds;
}

void records_close(struct records *records)
{
    pthread_mutex_lock(&records->mutex);
    records->fd = -1;
    records->broken = -EBADF;
    BIO_set_fd(SSL_get_rbio(records->ssl), -1, BIO_NOCLOSE);
    BIO_set_fd(SSL_get_wbio(records->ssl), -1, BIO_NOCLOSE);
    pthread_mutex_unlock(&records->mutex);
}

/* ---- one step under the lock ---- */

/* A thread that takes the lock again and again does not keep the other one out, because the other
 * one holds next meanwhile. */
static void take(struct records *records)
{
    pthread_mutex_lock(&records->next);
    pthread_mutex_lock(&records->mutex);
    pthread_mutex_unlock(&records->next);
    ERR_clear_error();      /* of this thread: SSL_get_error() looks at it */
    errno = 0;
}

static void give(struct records *records) { pthread_mutex_unlock(&records->mutex); }

/* Why a step failed: POLLIN or POLLOUT to wait for, 0 at the connection's end, or -errno. */
static int why(struct records *records, int rc)
{
    int number = errno;

    switch (SSL_get_error(records->ssl, rc)) {
    case SSL_ERROR_WANT_READ:
        return POLLIN;
    case SSL_ERROR_WANT_WRITE:
        return POLLOUT;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    case SSL_ERROR_SYSCALL:
        return records->problem ? -EPROTO : -number;
    default:
        /* The peer ends the connection without a word of TLS, as lanes do.  Whether the connection
         * may end there is for the reader of the frames to judge. */
        if (ERR_GET_REASON(ERR_peek_last_error()) == SSL_R_UNEXPECTED_EOF_WHILE_READING)
            return 0;
        if (!records->problem)
            records->problem = ERR_reason_error_string(ERR_peek_last_error());
        return -EPROTO;
    }
}

/* Wait for an event.  Returns 0, or -errno. */
static int wait_for(const struct records *records, int event, int timeout_ms)
{
    struct pollfd fd = { .fd = records->fd, .events = event };

    for (;;) {
        int n = poll(&fd, 1, timeout_ms);

        if (n > 0)
            return 0;
        if (!n)
            return -EAGAIN;
        if (errno != EINTR)
            return -errno;
    }
}

static void yield_cpu(size_t *since, size_t moved)
{
    *since += moved;
    if (*since >= YIELD_BYTES) {
        sched_yield();
        *since = 0;
    }
}

/* ---- sending ---- */

/* Encrypt with a new key from here on.  Returns 0, or -errno.  While OpenSSL has a KeyUpdate to
 * send, SSL_read receives nothing, and two ends whose sockets are full would wait for each other.
 * So the message is sent when the socket has room.  The next SSL_write reports an error of OpenSSL.
 */
static int renew_key(struct records *records)
{
    int rc = wait_for(records, POLLOUT, records->send_timeout_ms);

    if (rc)
        return rc;
    take(records);
    if (SSL_key_update(records->ssl, SSL_KEY_UPDATE_NOT_REQUESTED) == 1)
        SSL_do_handshake(records->ssl);
    give(records);
    records->under_key = 0;
    return 0;
}

static int send_record(struct records *records, const uint8_t *at, size_t bytes)
{
    while (bytes) {
        size_t sent = 0;
        int rc, event;

        take(records);
        rc = SSL_write_ex(records->ssl, at, bytes, &sent);
        event = rc == 1 ? 0 : why(records, rc);
        give(records);
        at += sent;
        bytes -= sent;
        if (event > 0)
            event = wait_for(records, event, records->send_timeout_ms);
        else if (rc != 1 && !event)
            event = -EPIPE;
        if (event < 0)
            return event;
    }
    return 0;
}

/* While this is on, the kernel puts records together into segments of up to 64 KiB. */
static void cork(const struct records *records, int on)
{
    if (records->is_tcp)
        setsockopt(records->fd, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
}

static int send_pieces(struct records *records, const struct iovec *pieces, size_t n)
{
    uint8_t gathered[RECORD_BYTES];
    size_t since = 0, offset = 0;   /* the next bytes begin at offset, in the first of pieces */

    while (n) {
        const uint8_t *from = gathered;
        size_t bytes = 0;
        int rc;

        if (records->broken)
            return records->broken;
        if (pieces->iov_len - offset >= RECORD_BYTES) {
            from = (const uint8_t *)pieces->iov_base + offset;
            bytes = RECORD_BYTES;
            offset += bytes;
        }
        while (n && bytes < RECORD_BYTES) {
            size_t left = pieces->iov_len - offset, room = RECORD_BYTES - bytes;
            size_t now = left < room ? left : room;

            memcpy(gathered + bytes, (const uint8_t *)pieces->iov_base + offset, now);
            bytes += now;
            offset += now;
            if (now == left) {
                pieces++;
                n--;
                offset = 0;
            }
        }
        rc = records->under_key++ == RECORDS_PER_KEY ? renew_key(records) : 0;
        if (!rc)
            rc = send_record(records, from, bytes);
        if (rc)
            return records->broken = rc;
        yield_cpu(&since, bytes);
    }
    return 0;
}

int records_send(struct records *records, const struct iovec *pieces, size_t n)
{
    size_t bytes = 0;
    int rc;

    for (size_t i = 0; i < n; i++)
        bytes += pieces[i].iov_len;
    if (bytes <= RECORD_BYTES)
        return send_pieces(records, pieces, n);
    cork(records, 1);
    rc = send_pieces(records, pieces, n);
    cork(records, 0);
    return rc;
}

/* ---- receiving ---- */

/* Receive some bytes.  Returns as why() does; 0 and no bytes is the connection's end. */
static int receive_some(struct records *records, void *into, size_t bytes, size_t *got)
{
    int rc, event = 0;

    *got = 0;
    take(records);
    if (!records->is_stopped) {
        rc = SSL_read_ex(records->ssl, into, bytes, got);
        event = rc == 1 ? 0 : why(records, rc);
    }
    give(records);
    return event;
}

long records_receive(struct records *records, void *into, size_t bytes, int flags)
{
    size_t done = 0, since = 0, acknowledged = 0;

    while (done < bytes) {
        size_t got;
        int event;

        /* bulk.c has the reason. */
        if (records->is_tcp && flags & MSG_WAITALL && done >= acknowledged) {
            setsockopt(records->fd, IPPROTO_TCP, TCP_QUICKACK, &(int){ 1 }, sizeof(int));
            acknowledged = done + ACK_BYTES;
        }
        event = receive_some(records, (uint8_t *)into + done, bytes - done, &got);
        if (event > 0)
            event = flags & MSG_DONTWAIT ? -EAGAIN : wait_for(records, event, -1);
        else if (!event && !got)
            break;
        if (event < 0)
            return event;
        done += got;
        if (got && !(flags & MSG_WAITALL))
            break;
        yield_cpu(&since, got);
    }
    return done;
}

/* OpenSSL may have read only a part of a record.  A request for one byte, which stays in OpenSSL's
 * buffer, shows whether bytes can be received. */
static int can_receive(struct records *records)
{
    uint8_t byte;
    size_t got;
    int rc;

    if (SSL_pending(records->ssl))
        return 1;
    if (!SSL_has_pending(records->ssl) || records->is_stopped)
        return 0;
    rc = SSL_peek_ex(records->ssl, &byte, 1, &got);
    return rc == 1 || why(records, rc) <= 0;    /* the next receive gets the reason */
}

int records_are_buffered(struct records *records)
{
    int can;

    take(records);
    can = can_receive(records);
    give(records);
    return can;
}

const char *records_problem(struct records *records)
{
    const char *problem;

    take(records);
    problem = records->problem;
    give(records);
    return problem;
}
