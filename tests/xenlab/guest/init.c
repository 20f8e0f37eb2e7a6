/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The only program of a guest with Linux: fills memory with a known pattern, continues to write to
 * it, checks all that it reads (pattern.h), and prints a heartbeat:
 *
 *     heartbeat N steps S errors E longest L ms
 *
 * Kernel command line: pages=N (the pages to fill; default: two thirds of what is free), rate=N
 * (steps a second; default: as fast as it can), beat=N (milliseconds from one heartbeat to the
 * next; default: 500), words=N (the words of a page that a step reads and writes; default: 512),
 * clock=1 (read the clock at each step; without it the clock is read a hundred times a second,
 * because a step of a few words takes less time than reading the clock), grow=N (pages: when the
 * balloon has added memory, use up to so many more, fill them as well, and print "grown to N
 * pages"), disk=N (the threads that use the first disk, see disk.h; default: none), buffers=N (the
 * pages that each of these threads uses; default: 512), net=N (use the network, see net.h; N is the
 * last byte of the guest's address; default: none), cpus=N (the CPUs on which memory is used, see
 * cpus.h, each with an equal part of the pages; default: one, which need not be the same all the
 * time), clocks=1 (sleep and check the clock as well, see clock.h), cd=1 (read the first CD, see
 * cd.h), screen=1 (print the heartbeats to the screen as well).
 *
 * As /sbin/poweroff and /sbin/reboot, which the kernel runs for `xl shutdown` and `xl reboot`, the
 * program ends the guest.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* Loads a kernel module.  Returns whether it is there; otherwise errno has the reason. */
static int load(const char *module)
{
    int fd = open(module, O_RDONLY | O_CLOEXEC), failed;

    if (fd < 0)
        return 0;
    failed = syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST;
    close(fd);
    return !failed;
}

/* Waits up to a minute for a device, and opens the device.  Returns -1 if that fails; errno has the
 * reason. */
static int open_device(const char *path, int flags)
{
    int fd;

    for (int tries = 0; (fd = open(path, flags)) < 0 && tries < 600; tries++)
        usleep(100000);
    return fd;
}

#include "clock.h"
#include "cpus.h"
#include "disk.h"
#include "cd.h"
#include "net.h"

#define MOST_CPUS 16u

static unsigned long option(const char *line, const char *name, unsigned long otherwise)
{
    const char *at = strstr(line, name);

    return at ? strtoul(at + strlen(name), NULL, 0) : otherwise;
}

/* Memory that stays free when the program takes more: without it Linux has nothing for itself. */
#define RESERVE (3ul << 20)
#define LEAST_GROWTH 64

/* Three quarters of what the balloon has added since memory was least, as far as that is free. */
static void grow(struct memory *memory, uint64_t first, uint64_t most)
{
    static unsigned long least = ~0ul;
    struct sysinfo info;
    uint64_t before = memory->pages, wanted, free_bytes, spare;

    sysinfo(&info);
    if (info.totalram * info.mem_unit < least)
        least = info.totalram * info.mem_unit;
    wanted = first + (info.totalram * info.mem_unit - least) / PAGE * 3 / 4;
    if (wanted > first + most)
        wanted = first + most;
    free_bytes = info.freeram * info.mem_unit;
    spare = free_bytes > RESERVE ? (free_bytes - RESERVE) / PAGE : 0;
    if (wanted > before + spare)
        wanted = before + spare;
    if (wanted < before + LEAST_GROWTH)
        return;
    memory->pages = wanted;
    fill(memory, before);
    printf("grown to %lu pages\n", (unsigned long)wanted);
}

static volatile sig_atomic_t due;

static void on_timer(int signal)
{
    (void)signal;
    due = 1;
}

/* Prints to the console from now on, and reads the kernel's command line. */
static void set_up(char *line, size_t bytes)
{
    int fd;

    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    fd = open("/dev/hvc0", O_RDWR);
    if (fd < 0)
        fd = open("/dev/ttyS0", O_RDWR);
    if (fd >= 0) {
        dup2(fd, 1);
        dup2(fd, 2);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    fd = open("/proc/cmdline", O_RDONLY);
    if (fd < 0 || read(fd, line, bytes - 1) < 0)
        printf("no command line\n");
    if (fd >= 0)
        close(fd);
}

/* What the command line asks for. */
static struct cpu cpus[MOST_CPUS];
static struct memory *const memory = &cpus->memory;
static unsigned cpu_count;
static uint64_t first, most;
static struct disk disk;
static struct net net;
static struct cd cd;
static int has_disk, has_net, has_clock, has_cd;
static FILE *screen;

/* Takes the memory, and fills it.  Returns whether there is enough. */
static int take_memory(const char *line)
{
    struct sysinfo info;
    uint64_t pages;

    sysinfo(&info);
    cpu_count = option(line, "cpus=", 1);
    pages = option(line, "pages=", info.freeram * info.mem_unit / PAGE * 2 / 3);
    first = pages / cpu_count;
    most = option(line, "grow=", 0);
    memory->pages = first;
    memory->used = option(line, "words=", WORDS);
    cpus->rate = option(line, "rate=", 0);
    if (cpu_count > MOST_CPUS || !allocate(memory, first + most)) {
        printf("no memory for %lu pages, or too many CPUs\n", (unsigned long)pages);
        return 0;
    }
    fill(memory, 0);
    printf("filled %lu pages\n", (unsigned long)memory->pages);
    return 1;
}

/* Starts what works beside the first CPU. */
static void start_others(const char *line)
{
    unsigned host = option(line, "net=", 0);

    disk.threads = option(line, "disk=", 0);
    disk.buffers = option(line, "buffers=", 512);
    has_disk = disk.threads && start_disk(&disk);
    has_net = host && start_net(&net, host);
    has_clock = option(line, "clocks=", 0) && start_clock();
    has_cd = option(line, "cd=", 0) && start_cd(&cd);
    if (option(line, "screen=", 0))
        screen = fopen("/dev/tty0", "w");

    /* Last, because other threads must not be bound to the first CPU. */
    if (cpu_count > 1 && !start_cpus(cpus, cpu_count))
        printf("not all CPUs are used\n");
}

static void beat(double longest)
{
    static uint64_t beats;

    printf("heartbeat %lu steps %lu errors %lu longest %.0f ms\n", (unsigned long)++beats,
           (unsigned long)memory->steps, (unsigned long)memory->errors, longest * 1000);
    if (screen) {
        fprintf(screen, "heartbeat %lu steps %lu\n", (unsigned long)beats,
                (unsigned long)memory->steps);
        fflush(screen);
    }
    if (has_disk)
        print_disk(&disk);
    if (has_net)
        print_net(&net);
    if (has_clock)
        print_clock();
    if (has_cd)
        print_cd(&cd);
    if (cpu_count > 1)
        print_cpus(cpus, cpu_count);
    if (most)
        grow(memory, first, most);
}

/* Works, and prints a heartbeat every so many seconds. */
static void run(double every, int by_timer)
{
    struct itimerval timer = { .it_interval.tv_usec = 10000, .it_value.tv_usec = 10000 };
    double longest = 0, last, next;

    if (by_timer) {
        signal(SIGALRM, on_timer);
        setitimer(ITIMER_REAL, &timer, NULL);
    }
    last = next = now();
    for (;;) {
        double t;

        work(cpus);
        if (by_timer && !due)
            continue;
        due = 0;
        t = now();
        if (t - last > longest)
            longest = t - last;
        last = t;
        if (t >= next) {
            next = t + every;
            beat(longest);
            longest = 0;
        }
    }
}

int main(int count, char **arguments)
{
    const char *name = count ? arguments[0] : "";
    char line[4096] = "";

    if (strstr(name, "poweroff"))
        return reboot(RB_POWER_OFF);
    if (strstr(name, "reboot"))
        return reboot(RB_AUTOBOOT);
    set_up(line, sizeof(line));
    if (!take_memory(line))
        return 1;
    start_others(line);
    run(option(line, "beat=", 500) / 1e3, memory->used < WORDS && !option(line, "clock=", 0));
}
