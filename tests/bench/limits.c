/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What this machine's loopback can do, measured by a plain C program: the limits to which the
 * figures of the daemons are compared.
 *
 *   limits roundtrip N      N requests of 64 bytes, each answered with 4 KiB: "p50_us p99_us"
 *   limits chain N          the same with the wake-ups of a fault: a vCPU's thread signals a
 *                           pager's, which sends the request, and signals the vCPU's thread when
 *                           the answer has arrived: "p50_us p99_us", as the vCPU sees it
 *   limits link PORT MS BYTES
 *                           not a limit, but a link: prints a port, and passes what arrives there
 *                           to PORT, and back, MS milliseconds later in each direction, and at
 *                           most BYTES a second of all connections (0: as fast as it can)
 *   limits bulk BYTES [CC]  BYTES one way in 4 MiB writes and reads: "bytes_per_s"; with congestion
 *                           control CC instead of the host's
 *   limits into BYTES CC    the same, from memory and into memory of that size; the latter has
 *                           never been used, as the memory of an arriving guest
 *   limits memcpy BYTES     copies between two 4 MiB buffers: "bytes_per_s"
 *
 * Two processes and one TCP connection over 127.0.0.1, as the daemons have.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (4 << 20)
#define REQUEST 64
#define ANSWER 4096

static char buffer[CHUNK], other[CHUNK];

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* The memory from which or into which "into" copies. */
static int memory = -1;
static char *source;

static void read_all(int fd, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t got = read(fd, buffer + done % CHUNK,
                           n - done < CHUNK - done % CHUNK ? n - done : CHUNK - done % CHUNK);

        if (got <= 0)
            die("read");
        if (memory >= 0 && pwrite(memory, buffer + done % CHUNK, got, done) != got)
            die("memory");
        done += got;
    }
}

static void write_all(int fd, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t put = write(fd, source ? source + done : buffer,
                            n - done < CHUNK ? n - done : CHUNK);

        if (put <= 0)
            die("write");
        done += put;
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Returns this process's end; the child has the other end.  *child: its pid, and 0 in the child. */
static int pair(pid_t *child, const char *congestion)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), fd, one = 1;

    if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) || listen(listener, 1) ||
        getsockname(listener, (void *)&address, &length))
        die("listen");
    *child = fork();
    if (*child < 0)
        die("fork");
    if (*child == 0) {
        fd = accept(listener, NULL, NULL);
    } else {
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (fd < 0 || connect(fd, (void *)&address, sizeof(address)))
            die("connect");
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (congestion && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, strlen(congestion)))
        die(congestion);
    return fd;
}

/* ---- chain ---- */
static int to_pager, to_vcpu, lane;

static void *pager(void *faults)
{
    struct pollfd fds[2] = { { .fd = to_pager, .events = POLLIN },
                             { .fd = lane, .events = POLLIN } };
    uint64_t count = 1;

    for (unsigned long left = *(unsigned long *)faults; left;) {
        if (poll(fds, 2, -1) < 0)
            die("poll");
        if (fds[0].revents) {
            if (read(to_pager, &count, sizeof(count)) < 0)
                die("eventfd");
            write_all(lane, REQUEST);
        }
        if (fds[1].revents) {
            read_all(lane, ANSWER);
            left--;
            if (write(to_vcpu, &(uint64_t){ 1 }, sizeof(count)) < 0)
                die("eventfd");
        }
    }
    return NULL;
}

static void one_fault(void)
{
    uint64_t count = 1;

    if (write(to_pager, &count, sizeof(count)) < 0 || read(to_vcpu, &count, sizeof(count)) < 0)
        die("eventfd");
}

/* ---- link: one thread reads a direction, another writes it when it is due ---- */
#define PIECE (64 << 10)
#define PIECES 4096
#define PIECES_OF_RATE 8        /* what a connection may queue before a link that has a rate */

/* One direction of the link.  Connections take turns piece by piece. */
static struct wire {
    pthread_mutex_t lock;
    double free_at;
} wires[2] = { { PTHREAD_MUTEX_INITIALIZER, 0 }, { PTHREAD_MUTEX_INITIALIZER, 0 } };
static double delay_s, bytes_per_s;

struct pipe {
    int from, to;
    struct wire *wire;
    unsigned long in, out;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct { double due; ssize_t size; char *data; } pieces[PIECES];
};

static void *take(void *argument)
{
    struct pipe *pipe = argument;
    ssize_t got;

    do {
        char *data = malloc(PIECE);

        got = read(pipe->from, data, PIECE);
        pthread_mutex_lock(&pipe->lock);
        while (pipe->in - pipe->out == (bytes_per_s ? PIECES_OF_RATE : PIECES))
            pthread_cond_wait(&pipe->changed, &pipe->lock);
        pipe->pieces[pipe->in % PIECES].due = now() + delay_s;
        pipe->pieces[pipe->in % PIECES].size = got;
        pipe->pieces[pipe->in++ % PIECES].data = data;
        pthread_cond_broadcast(&pipe->changed);
        pthread_mutex_unlock(&pipe->lock);
    } while (got > 0);
    return NULL;
}

/* Return when a piece that is due has passed the wire. */
static double passed(struct wire *wire, double due, ssize_t size)
{
    if (!bytes_per_s || size <= 0)
        return due;
    pthread_mutex_lock(&wire->lock);
    wire->free_at = (wire->free_at > now() ? wire->free_at : now()) + size / bytes_per_s;
    if (wire->free_at > due)
        due = wire->free_at;
    pthread_mutex_unlock(&wire->lock);
    return due;
}

static void *give(void *argument)
{
    struct pipe *pipe = argument;

    for (;;) {
        pthread_mutex_lock(&pipe->lock);
        while (pipe->in == pipe->out)
            pthread_cond_wait(&pipe->changed, &pipe->lock);
        double due = pipe->pieces[pipe->out % PIECES].due, wait;
        ssize_t size = pipe->pieces[pipe->out % PIECES].size;
        char *data = pipe->pieces[pipe->out % PIECES].data;

        pthread_mutex_unlock(&pipe->lock);
        wait = passed(pipe->wire, due, size) - now();
        if (wait > 0)
            usleep(wait * 1e6);
        for (ssize_t done = 0, put; done < size; done += put)
            if ((put = send(pipe->to, data + done, size - done, MSG_NOSIGNAL)) < 0)
                size = 0;
        free(data);
        if (size <= 0)
            break;
        pthread_mutex_lock(&pipe->lock);
        pipe->out++;
        pthread_cond_broadcast(&pipe->changed);
        pthread_mutex_unlock(&pipe->lock);
    }
    shutdown(pipe->to, SHUT_WR);
    return NULL;
}

static void link_to(unsigned short port)
{
    struct sockaddr_in address = { .sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;

    if (listener < 0 || bind(listener, (void *)&address, sizeof(address)) || listen(listener, 8) ||
        getsockname(listener, (void *)&address, &length))
        die("listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int here = accept(listener, NULL, NULL), there = socket(AF_INET, SOCK_STREAM, 0);

        address.sin_port = htons(port);
        if (here < 0 || there < 0 || connect(there, (void *)&address, sizeof(address)))
            die("connect");
        for (int way = 0; way < 2; way++) {
            struct pipe *pipe = calloc(1, sizeof(*pipe));
            pthread_t thread;

            if (!pipe)
                die("no memory");
            pipe->from = way ? there : here;
            pipe->to = way ? here : there;
            pipe->wire = &wires[way];
            pthread_mutex_init(&pipe->lock, NULL);
            pthread_cond_init(&pipe->changed, NULL);
            setsockopt(pipe->to, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
            pthread_create(&thread, NULL, take, pipe);
            pthread_create(&thread, NULL, give, pipe);
        }
    }
}

/* ---- what is measured: each prints its figures ---- */
static void copies(unsigned long n)
{
    double start = now();

    for (unsigned long done = 0; done < n; done += CHUNK)
        memcpy(done / CHUNK % 2 ? buffer : other, done / CHUNK % 2 ? other : buffer, CHUNK);
    printf("%.0f\n", n / (now() - start));
}

static void wake_by_pager(int fd, unsigned long *n)
{
    pthread_t thread;

    lane = fd;
    to_pager = eventfd(0, 0);
    to_vcpu = eventfd(0, 0);
    pthread_create(&thread, NULL, pager, n);
}

static void round_trips(int fd, int is_child, int chain, unsigned long n)
{
    double *times = calloc(n, sizeof(*times));

    if (!times)
        die("no memory");
    for (unsigned long i = 0; i < n; i++) {
        double start = now();

        if (!is_child && chain) {
            one_fault();
        } else if (!is_child) {
            write_all(fd, REQUEST);
            read_all(fd, ANSWER);
        } else {
            read_all(fd, REQUEST);
            write_all(fd, ANSWER);
        }
        times[i] = (now() - start) * 1e6;
    }
    if (!is_child) {
        qsort(times, n, sizeof(*times), compare);
        printf("%.1f %.1f\n", times[n / 2], times[n * 99 / 100]);
    }
    free(times);
}

/* Makes the memory from which the parent sends, and into which the child receives. */
static void make_memory(int fd, int is_child, unsigned long n)
{
    int file = memfd_create("memory", 0);

    if (ftruncate(file, n))
        die("memory");
    if (is_child) {
        write_all(fd, 1);
        memory = file;
    } else {
        source = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        memset(source, 1, n);
        read_all(fd, 1);
    }
}

static void bulk(int fd, int is_child, unsigned long n)
{
    double start = now();

    if (is_child)
        read_all(fd, n);
    else
        write_all(fd, n);
    memory = -1;
    source = NULL;
    if (is_child) {
        write_all(fd, 1);
    } else {
        read_all(fd, 1);
        printf("%.0f\n", n / (now() - start));
    }
}

int main(int argc, char **argv)
{
    unsigned long n = argc >= 3 ? strtoul(argv[2], NULL, 10) : 0;
    int chain, fd;
    pid_t child;

    if (!n) {
        fprintf(stderr,
                "usage: limits roundtrip N | chain N | link PORT MS BYTES | "
                "bulk BYTES [CC] | into BYTES CC | memcpy BYTES\n");
        return 2;
    }
    if (!strcmp(argv[1], "link") && argc == 5) {
        delay_s = strtod(argv[3], NULL) / 1e3;
        bytes_per_s = strtod(argv[4], NULL);
        link_to(n);
    }
    memset(buffer, 1, sizeof(buffer));
    memset(other, 2, sizeof(other));
    if (!strcmp(argv[1], "memcpy")) {
        copies(n);
        return 0;
    }
    fd = pair(&child, argv[3]);
    chain = !strcmp(argv[1], "chain");
    if (chain && child)
        wake_by_pager(fd, &n);
    if (chain || !strcmp(argv[1], "roundtrip")) {
        round_trips(fd, !child, chain, n);
    } else {
        if (!strcmp(argv[1], "into"))
            make_memory(fd, !child, n);
        bulk(fd, !child, n);
    }
    if (child)
        wait(NULL);
    return 0;
}
