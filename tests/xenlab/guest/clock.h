/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Whether the clock of a guest of the lab goes on: each CPU reads CLOCK_MONOTONIC, and compares it
 * with the latest time that any CPU has read.  Three threads sleep again and again, each in another
 * way, and compare the clock with the time at which they had to wake.
 *
 *     clock reads R backwards B woken W W W early E latest L ms
 */
#include <pthread.h>
#include <stdatomic.h>
#include <sys/timerfd.h>

#define SLEEP_NS 3000000000ull  /* longer than a guest is suspended: a sleep spans a handover */
#define SLEEPERS 3

struct clock {
    _Atomic uint64_t latest_ns, reads, backwards, woken[SLEEPERS], early, late_ns;
};

static struct clock clock_use;

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct timespec timespec_of(uint64_t ns)
{
    return (struct timespec){ .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
}

static void raise_to(_Atomic uint64_t *most, uint64_t value)
{
    uint64_t before = *most;

    while (value > before && !atomic_compare_exchange_weak(most, &before, value))
        ;
}

static void read_clock(void)
{
    uint64_t before = clock_use.latest_ns, now_ns = clock_ns();

    clock_use.reads++;
    if (now_ns < before && !clock_use.backwards++)
        printf("the clock went back from %lu to %lu ns\n", (unsigned long)before,
               (unsigned long)now_ns);
    raise_to(&clock_use.latest_ns, now_ns);
}

/* Waits until the time, in the sleeper's way. */
static void sleep_until(unsigned sleeper, int timer, uint64_t due_ns)
{
    struct timespec due = timespec_of(due_ns), relative = timespec_of(SLEEP_NS);
    struct itimerspec once = { .it_value = due };
    uint64_t expirations;

    if (sleeper == 0) {
        nanosleep(&relative, NULL);
    } else if (sleeper == 1) {
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
    } else {
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &once, NULL);
        if (read(timer, &expirations, sizeof(expirations)) < 0)
            printf("no timer: %s\n", strerror(errno));
    }
}

static void *sleep_again_and_again(void *argument)
{
    unsigned sleeper = (uintptr_t)argument;
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);

    for (;;) {
        uint64_t due_ns = clock_ns() + SLEEP_NS, woken_ns;

        sleep_until(sleeper, timer, due_ns);
        woken_ns = clock_ns();
        clock_use.early += woken_ns < due_ns;
        if (woken_ns > due_ns)
            raise_to(&clock_use.late_ns, woken_ns - due_ns);
        clock_use.woken[sleeper]++;
    }
    return NULL;
}

/* Returns whether the sleepers sleep. */
static int start_clock(void)
{
    pthread_t thread;

    for (uintptr_t sleeper = 0; sleeper < SLEEPERS; sleeper++)
        if (pthread_create(&thread, NULL, sleep_again_and_again, (void *)sleeper))
            return 0;
    return 1;
}

static void print_clock(void)
{
    printf("clock reads %lu backwards %lu woken %lu %lu %lu early %lu latest %lu ms\n",
           (unsigned long)clock_use.reads, (unsigned long)clock_use.backwards,
           (unsigned long)clock_use.woken[0], (unsigned long)clock_use.woken[1],
           (unsigned long)clock_use.woken[2], (unsigned long)clock_use.early,
           (unsigned long)atomic_exchange(&clock_use.late_ns, 0) / 1000000);
}
