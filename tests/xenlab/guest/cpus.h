/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The CPUs of a guest of the lab: a thread on each writes and checks memory of its own, as
 * pattern.h has it.  The thread on the first CPU is the program's own.  For each CPU:
 *
 *     cpu C steps S errors E
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

struct cpu {
    unsigned number;
    uint64_t rate;      /* steps a second; 0: as fast as it can */
    struct memory memory;
    _Atomic uint64_t steps, errors;
};

/* Makes memory for so many pages, of which memory.pages are used.  Returns whether there is so
 * much. */
static int allocate(struct memory *memory, uint64_t pages)
{
    memory->words = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory->writes = calloc(pages, sizeof(*memory->writes));
    return memory->words != MAP_FAILED && memory->writes;
}

static void stay_on(unsigned cpu)
{
    cpu_set_t only;

    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    if (sched_setaffinity(0, sizeof(only), &only))
        printf("no CPU %u: %s\n", cpu, strerror(errno));
}

/* One step.  The thread sleeps, and reads the clock, as often as its rate demands. */
static void work(struct cpu *own)
{
    struct memory *memory = &own->memory;

    if (step(memory))
        printf("error: CPU %u: word %lu is %lx\n", own->number, (unsigned long)memory->wrong_at,
               (unsigned long)memory->wrong);
    atomic_store_explicit(&own->steps, memory->steps, memory_order_relaxed);
    atomic_store_explicit(&own->errors, memory->errors, memory_order_relaxed);
    if (own->rate && memory->steps % (own->rate / 100 + 1) == 0) {
        usleep(10000);
        read_clock();
    }
}

static void *use_cpu(void *argument)
{
    struct cpu *own = argument;

    stay_on(own->number);
    fill(&own->memory, 0);
    for (;;)
        work(own);
    return NULL;
}

/* Starts a thread on each CPU but the first, with as much memory as the first has.  Returns whether
 * all have started. */
static int start_cpus(struct cpu *cpus, unsigned count)
{
    pthread_t thread;

    stay_on(0);
    for (unsigned number = 1; number < count; number++) {
        struct cpu *cpu = &cpus[number];

        cpu->number = number;
        cpu->rate = cpus->rate;
        cpu->memory.pages = cpus->memory.pages;
        cpu->memory.used = cpus->memory.used;
        if (!allocate(&cpu->memory, cpu->memory.pages) ||
            pthread_create(&thread, NULL, use_cpu, cpu))
            return 0;
    }
    return 1;
}

static void print_cpus(const struct cpu *cpus, unsigned count)
{
    for (unsigned number = 0; number < count; number++)
        printf("cpu %u steps %lu errors %lu\n", number, (unsigned long)cpus[number].steps,
               (unsigned long)cpus[number].errors);
}
