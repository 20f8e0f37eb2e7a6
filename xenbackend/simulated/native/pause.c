/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The stops of a guest's vCPUs: they are paused, or the guest crashes.
 */
#include "host.h"

void crash(struct sim_host_domain *h, uint32_t vcpu, uint32_t reason, uint64_t pfn)
{
    struct sim_domain *d = h->m->dom;

    if (!d->crash) {
        d->crash_vcpu = vcpu;
        d->crash_pfn = pfn;
        __atomic_store_n(&d->crash, reason, __ATOMIC_SEQ_CST);  /* last, for other processes */
    }
    __atomic_fetch_or(&h->pause, 0x80000000u, __ATOMIC_SEQ_CST);
}

void crash_at(struct host_vcpu *v, uint64_t pfn)
{
    pthread_mutex_lock(&v->h->lock);
    crash(v->h, v->id, CRASH_BAD_ACCESS, pfn);
    pthread_mutex_unlock(&v->h->lock);
}

static int vcpus_running(struct sim_host_domain *h)
{
    int running = 0;

    for (uint32_t i = 0; i < h->m->dom->nr_vcpus; i++)
        running += h->vcpu[i].state == VCPU_RUNNING;
    return running;
}

void sim_host_pause(struct sim_host_domain *h)
{
    pthread_mutex_lock(&h->lock);
    __atomic_fetch_add(&h->pause, 1, __ATOMIC_SEQ_CST);
    wake_all(h);
    while (vcpus_running(h))
        pthread_cond_wait(&h->settled, &h->lock);
    pthread_mutex_unlock(&h->lock);
}

void sim_host_unpause(struct sim_host_domain *h)
{
    pthread_mutex_lock(&h->lock);
    if (h->pause & 0x7fffffffu)
        __atomic_fetch_sub(&h->pause, 1, __ATOMIC_SEQ_CST);
    wake_all(h);
    pthread_mutex_unlock(&h->lock);
}
