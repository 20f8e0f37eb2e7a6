/*
 * What this machine's loopback can do, measured by a plain C program: the limits that the figures of the
 * daemons are set against.
 *
 *   limits roundtrip N      N requests of 64 bytes, each answered with 4 KiB: "p50_us p99_us"
 *   limits bulk BYTES [CC]  BYTES one way in 4 MiB writes and reads: "bytes_per_s"; with congestion control CC
 *                           instead of the host's
 *   limits memcpy BYTES     copies between two 4 MiB buffers: "bytes_per_s"
 *
 * Two processes and one TCP connection over 127.0.0.1, as the daemons have.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static void read_all(int fd, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t got = read(fd, buffer + done % CHUNK, n - done < CHUNK - done % CHUNK ? n - done : CHUNK - done % CHUNK);

        if (got <= 0)
            die("read");
        done += got;
    }
}

static void write_all(int fd, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t put = write(fd, buffer, n - done < CHUNK ? n - done : CHUNK);

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

/* Returns this process's end; the child has the other, and *child is its pid or 0 in it. */
static int pair(pid_t *child, const char *congestion)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM, 0), fd, one = 1;

    if (bind(listener, (void *)&address, sizeof(address)) || listen(listener, 1) ||
        getsockname(listener, (void *)&address, &length))
        die("listen");
    *child = fork();
    if (*child < 0)
        die("fork");
    if (*child == 0) {
        fd = accept(listener, NULL, NULL);
    } else {
        fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (void *)&address, sizeof(address)))
            die("connect");
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (congestion && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, strlen(congestion)))
        die(congestion);
    return fd;
}

int main(int argc, char **argv)
{
    unsigned long n = argc >= 3 ? strtoul(argv[2], NULL, 10) : 0;
    pid_t child;
    double start;
    int fd;

    if (!n) {
        fprintf(stderr, "usage: limits roundtrip N | bulk BYTES [CC] | memcpy BYTES\n");
        return 2;
    }
    memset(buffer, 1, sizeof(buffer));
    memset(other, 2, sizeof(other));
    if (!strcmp(argv[1], "memcpy")) {
        start = now();
        for (unsigned long done = 0; done < n; done += CHUNK)
            memcpy(done / CHUNK % 2 ? buffer : other, done / CHUNK % 2 ? other : buffer, CHUNK);
        printf("%.0f\n", n / (now() - start));
        return 0;
    }
    fd = pair(&child, argv[3]);
    if (!strcmp(argv[1], "roundtrip")) {
        double *times = calloc(n, sizeof(*times));

        for (unsigned long i = 0; i < n; i++) {
            start = now();
            if (child) {
                write_all(fd, REQUEST);
                read_all(fd, ANSWER);
            } else {
                read_all(fd, REQUEST);
                write_all(fd, ANSWER);
            }
            times[i] = (now() - start) * 1e6;
        }
        if (child) {
            qsort(times, n, sizeof(*times), compare);
            printf("%.1f %.1f\n", times[n / 2], times[n * 99 / 100]);
        }
    } else {
        start = now();
        if (child)
            write_all(fd, n);
        else
            read_all(fd, n);
        if (child) {
            read_all(fd, 1);
            printf("%.0f\n", n / (now() - start));
        } else {
            write_all(fd, 1);
        }
    }
    if (child)
        wait(NULL);
    return 0;
}
