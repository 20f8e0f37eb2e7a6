/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * migrate/lanes/native/records.c for ThreadSanitizer: two ends of a TLS connection, at each of
 * which one thread sends while another one receives.
 *
 * The senders take new keys after almost every record, also when the sockets are full.  No end
 * requests the other end's new keys: OpenSSL would answer in SSL_read, which fails ("bad length")
 * while a record is not sent completely.  Neither daemon makes this request.  OpenSSL itself is not
 * compiled for the sanitizer; whatever it does without the lock of records.c damages the bytes that
 * arrive, and each byte is compared.
 */
#include <fcntl.h>
#include <openssl/x509.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
#define RECORDS_PER_KEY 2
#include "../../../migrate/lanes/native/records.c"

#define BYTES (16 << 20)        /* that each end sends */
#define MOST_AT_ONCE (200 << 10)

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))

static void fail(int line, const char *what)
{
    fprintf(stderr, "records.c:%d: not so: %s (%s)\n", line, what,
            ERR_reason_error_string(ERR_peek_last_error()));
    _exit(1);
}

/* ---- the connection ---- */
static SSL_CTX *context_of(const SSL_METHOD *method, EVP_PKEY *key, X509 *certificate)
{
    SSL_CTX *context = SSL_CTX_new(method);

    CHECK(context && SSL_CTX_use_certificate(context, certificate) == 1 &&
          SSL_CTX_use_PrivateKey(context, key) == 1);
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_AUTO_RETRY);
    return context;
}

static struct records *end_of(SSL_CTX *context, int fd)
{
    struct records *records;
    SSL *ssl;

    CHECK(!fcntl(fd, F_SETFL, O_NONBLOCK) && !records_watch());
    ssl = SSL_new(context);
    CHECK(ssl && SSL_set_fd(ssl, fd) == 1);
    records = records_take(fd, 0);
    CHECK(records && records->ssl == ssl && !records_take(fd, 0));
    SSL_free(ssl);      /* records has a reference of its own */
    return records;
}

static void connect_ends(struct records *ends[2])
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    SSL_CTX *server, *client;
    int fds[2], done = 0;

    CHECK(key && certificate && !socketpair(AF_UNIX, SOCK_STREAM, 0, fds));
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    CHECK(X509_set_pubkey(certificate, key) == 1 && X509_sign(certificate, key, EVP_sha256()));
    server = context_of(TLS_server_method(), key, certificate);
    client = context_of(TLS_client_method(), key, certificate);
    ends[0] = end_of(server, fds[0]);
    ends[1] = end_of(client, fds[1]);
    SSL_set_accept_state(ends[0]->ssl);
    SSL_set_connect_state(ends[1]->ssl);
    while (done != 3)
        for (int i = 0; i < 2; i++) {
            int rc = SSL_do_handshake(ends[i]->ssl);

            CHECK(rc == 1 || SSL_get_error(ends[i]->ssl, rc) == SSL_ERROR_WANT_READ);
            done |= (rc == 1) << i;
        }
    SSL_CTX_free(server);
    SSL_CTX_free(client);
    X509_free(certificate);
    EVP_PKEY_free(key);
}

/* ---- the threads ---- */
static uint8_t byte_at(size_t at) { return (at * 2654435761u) >> 13; }

static void *send_all(void *of)
{
    struct records *records = of;
    uint8_t *bytes = malloc(MOST_AT_ONCE);
    unsigned turn = 0;

    for (size_t at = 0; at < BYTES; turn++) {
        size_t n = 1 + (size_t)turn * 7919 % MOST_AT_ONCE;
        struct iovec pieces[3];

        n = n < BYTES - at ? n : BYTES - at;
        for (size_t i = 0; i < n; i++)
            bytes[i] = byte_at(at + i);
        pieces[0] = (struct iovec){ bytes, n / 3 };
        pieces[1] = (struct iovec){ bytes + n / 3, 0 };
        pieces[2] = (struct iovec){ bytes + n / 3, n - n / 3 };
        CHECK(!records_send(records, pieces, 3));
        at += n;
    }
    free(bytes);
    return NULL;
}

static void *receive_all(void *of)
{
    struct records *records = of;
    uint8_t *bytes = malloc(MOST_AT_ONCE);
    unsigned turn = 0;

    for (size_t at = 0; at < BYTES; turn++) {
        size_t n = 1 + (size_t)turn * 104729 % MOST_AT_ONCE;
        long got = records_receive(records, bytes, n < BYTES - at ? n : BYTES - at,
                                   turn % 2 ? MSG_WAITALL : 0);

        CHECK(got > 0 && !records_problem(records));
        for (long i = 0; i < got; i++)
            CHECK(bytes[i] == byte_at(at + i));
        at += got;
    }
    CHECK(!records_are_buffered(records));
    free(bytes);
    return NULL;
}

int main(void)
{
    struct records *ends[2];
    pthread_t threads[4];

    signal(SIGPIPE, SIG_IGN);
    connect_ends(ends);
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_create(&threads[i], NULL, i < 2 ? send_all : receive_all, ends[i % 2]));
    for (int i = 0; i < 4; i++)
        CHECK(!pthread_join(threads[i], NULL));
    for (int i = 0; i < 2; i++) {
        int fd = ends[i]->fd;

        records_free(ends[i]);
        close(fd);
    }
    return 0;
}
