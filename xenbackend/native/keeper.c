/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The keeper: a process that keeps the address space of this one, and with it the mapped pages of a
 * domain, when this process is killed.  It sends the pages to the successor.
 *
 * A page of a destroyed domain cannot be mapped again, and mappings of other domains are not copied
 * by fork().  So the keeper shares this process's memory (CLONE_VM), whose mappings stay until its
 * last user has ended.  Descriptors and handlers of signals are copies of its own; it closes all
 * descriptors that it does not need, and no signal but SIGKILL and SIGSTOP ends it.
 *
 * This process may die at any instruction, with any lock of libc held.  So the keeper calls nothing
 * of libc but makes system calls itself, and it has thread-local memory of its own, in which a
 * compiler may look for a stack's canary.
 *
 * The protocol, on a stream socket: the keeper sends its number of pfns.  A request is a number of
 * pfns and the pfns, the answer a PAGE_* for each, and the contents of those that have PAGE_DATA.
 * All numbers have 64 bits.  The request of no pfns ends the keeper.  The successor may be of a
 * later release, so the protocol stays as it is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include "keeper_api.h"

#define PAGE_BYTES 4096
#define PAGE_DATA 0             /* numbers shared with xenbackend.pages.PageStatus */
#define STACK_BYTES 65536
#define TLS_BYTES 4096          /* on both sides of the address that %fs has */
#define FIRST_FREE_FD 2         /* after the listener and `alive` */

struct keeper {
    struct keeper_setup setup;
    uint64_t pfns[KEEPER_MOST_PAGES];
    const void *pages[KEEPER_MOST_PAGES];
    struct iovec left[KEEPER_MOST_PAGES];
    uint8_t status[KEEPER_MOST_PAGES];
    uint8_t domain[KEEPER_DOMAIN_BYTES] __attribute__((aligned(16)));
    uint8_t tls[2 * TLS_BYTES] __attribute__((aligned(64)));
    uint8_t stack[STACK_BYTES] __attribute__((aligned(64)));
};

void *table_new(size_t bytes)
{
    void *table = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return table == MAP_FAILED ? NULL : table;
}

void table_free(void *table, size_t bytes)
{
    munmap(table, bytes);
}

void keeper_free(void *memory)
{
    table_free(memory, sizeof(struct keeper));
}

#ifdef __x86_64__
/* ---- in the keeper ---- */
#define IN_KEEPER \
    static __attribute__((no_sanitize("address"), no_sanitize("undefined"), no_sanitize("thread")))

#ifdef __clang_analyzer__       /* which takes assembly for code that changes nothing */
long call(long number, long a, long b, long c, long d);
#else
IN_KEEPER long call(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}
#endif

IN_KEEPER void end(void)
{
    for (;;)
        call(SYS_exit_group, 0, 0, 0, 0);
}

/* Wait until fd is readable.  End if what the keeper depends on has ended. */
IN_KEEPER void wait_readable(const struct keeper *k, int fd)
{
    struct pollfd polled[2];

    polled[0].fd = fd;
    polled[1].fd = k->setup.alive;
    for (;;) {
        polled[0].events = POLLIN;
        polled[1].events = 0;
        polled[0].revents = polled[1].revents = 0;
        call(SYS_poll, (long)polled, 2, -1, 0);
        if (polled[1].revents)
            end();
        if (polled[0].revents)
            return;
    }
}

IN_KEEPER int get(const struct keeper *k, int fd, void *into, size_t size)
{
    uint8_t *at = into;

    while (size) {
        long got;

        wait_readable(k, fd);
        got = call(SYS_read, fd, (long)at, (long)size, 0);
        if (got == -EINTR)
            continue;
        if (got <= 0)
            return -1;
        at += got;
        size -= (size_t)got;
    }
    return 0;
}

IN_KEEPER int put(int fd, struct iovec *left, size_t n)
{
    while (n) {
        long sent = call(SYS_writev, fd, (long)left, (long)n, 0);

        if (sent == -EINTR)
            continue;
        if (sent <= 0)      /* -EFAULT: a page is not mapped */
            return -1;
        while (n && (size_t)sent >= left->iov_len) {
            sent -= (long)left->iov_len;
            left++;
            n--;
        }
        if (n) {
            left->iov_base = (uint8_t *)left->iov_base + sent;
            left->iov_len -= (size_t)sent;
        }
    }
    return 0;
}

IN_KEEPER int put_one(int fd, void *from, size_t size)
{
    struct iovec one;

    one.iov_base = from;
    one.iov_len = size;
    return put(fd, &one, 1);
}

IN_KEEPER int send_pages(struct keeper *k, int fd, size_t n)
{
    int (*look)(void *, uint64_t, const void **) =
        (int (*)(void *, uint64_t, const void **))(uintptr_t)k->setup.look;
    void (*looked)(void *, const void *) =
        (void (*)(void *, const void *))(uintptr_t)k->setup.looked;
    size_t found = 0;
    int rc;

    for (size_t i = 0; i < n; i++) {
        if (k->pfns[i] >= k->setup.nr_pfns)
            return -1;
        k->status[i] = (uint8_t)look(k->domain, k->pfns[i], &k->pages[found]);
        if (k->status[i] != PAGE_DATA)
            continue;
        k->left[found].iov_base = (void *)(uintptr_t)k->pages[found];
        k->left[found].iov_len = PAGE_BYTES;
        found++;
    }
    rc = put_one(fd, k->status, n) || put(fd, k->left, found);
    for (size_t i = 0; looked && i < found; i++)
        looked(k->domain, k->pages[i]);
    return rc;
}

/* Returns 1 if the keeper is to end. */
IN_KEEPER int serve(struct keeper *k, int fd)
{
    uint64_t n;

    if (put_one(fd, &k->setup.nr_pfns, sizeof(n)))
        return 0;
    for (;;) {
        if (get(k, fd, &n, sizeof(n)) || n > KEEPER_MOST_PAGES)
            return 0;
        if (!n)
            return 1;
        if (get(k, fd, k->pfns, n * sizeof(k->pfns[0])) || send_pages(k, fd, n))
            return 0;
    }
}

/* Keep the listener as 0 and `alive` as 1.  All other descriptors are closed: peers and the lock of
 * the state directory must notice the end of the process. */
IN_KEEPER void close_others(struct keeper *k)
{
    long listener = call(SYS_fcntl, k->setup.listener, F_DUPFD, FIRST_FREE_FD, 0);
    long alive = -1;

    if (k->setup.alive >= 0)
        alive = call(SYS_fcntl, k->setup.alive, F_DUPFD, FIRST_FREE_FD, 0);
    if (listener < 0 || call(SYS_dup2, listener, 0, 0, 0) < 0)
        end();
    call(SYS_close, 1, 0, 0, 0);
    if (k->setup.alive >= 0 && call(SYS_dup2, alive, 1, 0, 0) < 0)
        end();
    if (call(SYS_close_range, FIRST_FREE_FD, ~0U, 0, 0) < 0)
        end();
    k->setup.listener = 0;
    k->setup.alive = k->setup.alive >= 0 ? 1 : -1;
}

IN_KEEPER void keep(struct keeper *k)
{
    close_others(k);
    call(SYS_prctl, PR_SET_NAME, (long)"xen-keeper", 0, 0);
    for (;;) {
        long fd;

        wait_readable(k, k->setup.listener);
        fd = call(SYS_accept, k->setup.listener, 0, 0, 0);
        if (fd < 0)
            continue;
        if (serve(k, (int)fd))
            end();
        call(SYS_close, fd, 0, 0, 0);
    }
}

/* ---- in the process that starts it ---- */
static long start(struct keeper *k)
{
    long flags = CLONE_VM | CLONE_SETTLS | SIGCHLD;
    register void *tls __asm__("r8") = k->tls + TLS_BYTES;
    register long none __asm__("r10") = 0;
    register void (*child)(struct keeper *) __asm__("r12") = keep;
    register struct keeper *of __asm__("r13") = k;
    long result;

    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "xor %%ebp, %%ebp\n\t"
                     "mov %[of], %%rdi\n\t"
                     "call *%[child]\n\t"
                     "ud2\n"
                     "1:"
                     : "=a"(result)
                     : "a"((long)SYS_clone), "D"(flags), "S"(k->stack + STACK_BYTES), "d"(0L),
                       "r"(none), "r"(tls), [child] "r"(child), [of] "r"(of)
                     : "rcx", "r11", "memory", "cc");
    return result;
}

int keeper_start(const struct keeper_setup *setup, void **memory)
{
    struct keeper *k;
    sigset_t all, before;
    long pid;

    if (setup->domain_bytes > KEEPER_DOMAIN_BYTES)
        return -EINVAL;
    k = table_new(sizeof(*k));
    if (!k)
        return -ENOMEM;
    k->setup = *setup;
    memcpy(k->domain, (const void *)(uintptr_t)setup->domain, setup->domain_bytes);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid = start(k);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid < 0)
        keeper_free(k);
    else
        *memory = k;
    return (int)pid;
}
#else
int keeper_start(const struct keeper_setup *setup, void **memory)
{
    (void)setup;
    (void)memory;
    return -ENOSYS;
}
#endif
