/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vCPUs: native threads that run a guest program against the simulated MMU.
 *
 * A vCPU makes one access after the other.  It can be paused between two accesses.  While it waits
 * for a page or for a slot in the ring, it counts as not running.  When the answer arrives, it
 * tests first whether it is paused, as a real vCPU does.  An access is done entirely or not at all,
 * so `count` is all that a vCPU's context has to hold.  The same holds for the steps of the
 * balloon, which vCPU 0 makes.
 *
 * Log-dirty is marked *after* the write and before the access is over.  A page cleaned between the
 * two is marked again.  If it were marked before, the write could follow the copy and be lost.
 *
 * The threads run at a lower priority, because here the vCPUs share a few CPUs with the daemons.
 * On a real host they do not take CPUs from dom0.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include "host.h"

#define VCPU_NICE 10

static void park(struct host_vcpu *v)
{
    struct sim_host_domain *h = v->h;

    pthread_mutex_lock(&h->lock);
    set_state(v, VCPU_PARKED);
    while (stopping(h) && !h->exiting)
        pthread_cond_wait(&v->wake, &h->lock);
    set_state(v, VCPU_RUNNING);
    pthread_mutex_unlock(&h->lock);
}

/* Sleep until `deadline` or until there is something else to do. */
static void idle_until(struct host_vcpu *v, uint64_t deadline)
{
    struct sim_host_domain *h = v->h;
    struct timespec t = { deadline / 1000000000ull, deadline % 1000000000ull };

    pthread_mutex_lock(&h->lock);
    if (!stopping(h) && !h->exiting)
        pthread_cond_timedwait(&v->wake, &h->lock, &t);
    pthread_mutex_unlock(&h->lock);
}

/* Make one access to memory.  Returns 0 if it has to be tried again. */
static int access_page(struct host_vcpu *v, struct sim_access a)
{
    struct sim_map *m = v->h->m;
    const struct sim_program *p = &m->dom->program;
    struct sim_vcpu *arch = &m->dom->vcpu[v->id];
    uint64_t pfn = sim_pfn(p, a.page);
    uint32_t w = __atomic_fetch_add(&m->p2m[pfn], E_ACCESS, __ATOMIC_SEQ_CST);

    if (is_ram(E_TYPE(w)) && !E_OWNER(w)) {
        uint64_t *words = (uint64_t *)(m->memory + pfn * PAGE_BYTES);
        uint64_t n = sim_writes(p, v->id, a.page, a.visit);
        int wrong = 0;

        if (n) {
            wrong = words[sim_word(p, v->id, a.page, n - 1)] != sim_value(p, v->id, a.page, n - 1);
        } else if (p->generated) {
            uint32_t word = sim_word(p, v->id, a.page, 0);

            wrong = words[word] != sim_image_word(p, a.page, word);
        }
        if (wrong && !arch->errors++)
            arch->first_error_pfn = pfn;
        if (sim_writes(p, v->id, a.page, a.visit + 1) != n) {
            if (!(w & E_TOUCHED))
                __atomic_fetch_or(&m->p2m[pfn], E_TOUCHED, __ATOMIC_SEQ_CST);
            __atomic_store_n(&words[sim_word(p, v->id, a.page, n)], sim_value(p, v->id, a.page, n),
                             __ATOMIC_SEQ_CST);
            mark_dirty(m, pfn);
        }
        __atomic_fetch_sub(&m->p2m[pfn], E_ACCESS, __ATOMIC_SEQ_CST);
        return 1;
    }
    __atomic_fetch_sub(&m->p2m[pfn], E_ACCESS, __ATOMIC_SEQ_CST);
    if (E_OWNER(w))
        sched_yield();
    else if (is_paging(E_TYPE(w)))
        page_fault(v, pfn);
    else
        crash_at(v, pfn);
    return 0;
}

static void *vcpu_main(void *arg)
{
    struct host_vcpu *v = arg;
    struct sim_host_domain *h = v->h;
    struct sim_domain *d = h->m->dom;
    const struct sim_program *p = &d->program;
    struct sim_vcpu *arch = &d->vcpu[v->id];
    uint64_t period = p->rate ? 1000000000ull / p->rate : 0, next = now_ns();

    pthread_setname_np(pthread_self(), "vcpu");
    setpriority(PRIO_PROCESS, syscall(SYS_gettid), VCPU_NICE);
    while (!__atomic_load_n(&h->exiting, __ATOMIC_SEQ_CST)) {
        struct sim_access a;

        if (stopping(h)) {
            park(v);
            continue;
        }
        if (v->id == 0 && d->balloon_steps < sim_balloon_due(p, arch->count) && !move_balloon(v))
            continue;
        if (period) {
            uint64_t now = now_ns();

            if (now < next) {
                idle_until(v, next);
                continue;
            }
        }
        a = sim_access_at(p, v->id, arch->count);
        if (!access_page(v, a))
            continue;       /* the access is tried again, after a pause if there is one */
        if (period)
            /* the vCPU catches up with 0.1 s at most */
            next = next + 100000000 < now_ns() ? now_ns() : next + period;
        if (!arch->first_instruction_ns)
            arch->first_instruction_ns = now_ns();
        __atomic_store_n(&arch->count, arch->count + 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* -------- what the host's process calls -------- */

/* Do what Linux does first at a new host: register each vCPU's vcpu_info frame by number.  The
 * hypervisor takes a reference to the frame, and answers EINVAL if it is not present. */
int sim_host_resume_guest(struct sim_host_domain *h)
{
    struct sim_domain *d = h->m->dom;

    if (h->started)
        return 0;
    for (uint32_t i = 0; i < d->nr_vcpus; i++) {
        uint64_t pfn = d->vcpu[i].vcpu_info_pfn;
        uint32_t w = entry_lock(h->m, pfn);

        if (!is_ram(E_TYPE(w))) {
            entry_unlock(h->m, pfn);
            pthread_mutex_lock(&h->lock);
            crash(h, i, CRASH_VCPU_INFO, pfn);
            pthread_mutex_unlock(&h->lock);
            return -EINVAL;
        }
        if (!d->vcpu[i].registered)
            __atomic_fetch_add(&h->m->p2m[pfn], E_REF + E_TYPE_REF, __ATOMIC_SEQ_CST);
        d->vcpu[i].registered = 1;
        entry_unlock(h->m, pfn);
    }
    h->started = 1;
    return 0;
}

void sim_host_free(struct sim_host_domain *h)
{
    pthread_mutex_lock(&h->lock);
    __atomic_store_n(&h->exiting, 1, __ATOMIC_SEQ_CST);
    wake_all(h);
    pthread_mutex_unlock(&h->lock);
    for (uint32_t i = 0; i < h->m->dom->nr_vcpus; i++)
        if (h->vcpu[i].has_thread)
            pthread_join(h->vcpu[i].thread, NULL);
    paging_disable(h);
    free(h);
}

struct sim_host_domain *sim_host_new(struct sim_map *m)
{
    struct sim_host_domain *h = calloc(1, sizeof(*h));
    pthread_condattr_t monotonic;
    sigset_t all, old;

    if (!h)
        return NULL;
    h->m = m;
    h->pause = 1;               /* a new domain is paused until its builder unpauses it */
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->settled, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    for (uint32_t i = 0; i < m->dom->nr_vcpus; i++) {
        h->vcpu[i].h = h;
        h->vcpu[i].id = i;
        pthread_cond_init(&h->vcpu[i].wake, &monotonic);
    }
    sigfillset(&all);           /* Python's threads handle the signals */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (uint32_t i = 0; i < m->dom->nr_vcpus; i++) {
        h->vcpu[i].state = VCPU_RUNNING;
        h->vcpu[i].has_thread = !pthread_create(&h->vcpu[i].thread, NULL, vcpu_main, &h->vcpu[i]);
        if (!h->vcpu[i].has_thread) {
            sim_host_free(h);
            h = NULL;
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return h;
}
