/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A domain in the host's process: vCPU threads, and the hypervisor's end of the paging ring.
 *
 * Each C file calls only earlier ones: pause.c, paging.c, balloon.c, vcpu.c.
 */
#ifndef SIM_HOST_H
#define SIM_HOST_H

#include <errno.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#include "internal.h"
#include "../../native/vm_event.h"

enum vcpu_state { VCPU_RUNNING, VCPU_PARKED, VCPU_WAIT_PAGE, VCPU_WAIT_SLOT };

struct host_vcpu {
    struct sim_host_domain *h;
    uint32_t id;
    pthread_t thread;
    int has_thread;
    pthread_cond_t wake;
    enum vcpu_state state;      /* under h->lock */
    int event_pause;            /* a request of this vCPU is unanswered (vm_event pause count) */
};

struct sim_host_domain {
    struct sim_map *m;
    pthread_mutex_t lock;
    pthread_cond_t settled;     /* a vCPU has changed its state; pause waits for this */
    uint32_t pause;             /* read without the lock by running vCPUs */
    int exiting;
    int started;
    struct host_vcpu vcpu[SIM_MAX_VCPUS];

    struct vm_event_sring *ring;    /* NULL: paging is off */
    uint32_t req_prod, rsp_cons;    /* the front end's private indices */
    int to_pager_fd, from_pager_fd, stop_fd;
    pthread_t responder;
};

static inline uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static inline void wake_fd(int fd)
{
    uint64_t one = 1;

    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

static inline int stopping(struct sim_host_domain *h)
{
    return __atomic_load_n(&h->pause, __ATOMIC_SEQ_CST) != 0;
}

static inline void set_state(struct host_vcpu *v, enum vcpu_state state)
{
    v->state = state;
    pthread_cond_broadcast(&v->h->settled);
}

static inline void wake_all(struct sim_host_domain *h)
{
    for (uint32_t i = 0; i < h->m->dom->nr_vcpus; i++)
        pthread_cond_signal(&h->vcpu[i].wake);
}

/* ---- pause.c ---- */
/* End the guest.  As a crashed domain, it is kept for inspection, with its vCPUs stopped.  Called
 * under h->lock. */
void crash(struct sim_host_domain *h, uint32_t vcpu, uint32_t reason, uint64_t pfn);
/* End a guest whose vCPU has touched a pfn that is no memory. */
void crash_at(struct host_vcpu *v, uint64_t pfn);

/* ---- paging.c: the front end of the paging ring; ring_ under h->lock ---- */
static inline int ring_slots_free(struct sim_host_domain *h)
{
    return VM_EVENT_SLOTS - (h->req_prod - h->rsp_cons);
}

void ring_put(struct sim_host_domain *h, uint64_t pfn, uint32_t vcpu, uint32_t flags, uint32_t type,
              uint32_t paging_flags);
/* p2m_mem_paging_populate(): send a request to the pager, and wait until it has answered. */
void page_fault(struct host_vcpu *v, uint64_t pfn);
/* XEN_VM_EVENT_DISABLE, for a domain whose vCPUs are stopped. */
int paging_disable(struct sim_host_domain *h);

/* ---- balloon.c ---- */
/* Do the next step of the balloon, entirely or not at all.  Returns 0 if it has to be tried
 * again. */
int move_balloon(struct host_vcpu *v);

#endif
