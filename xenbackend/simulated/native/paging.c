/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The hypervisor's end of the paging ring: it puts faults in, and takes answers out.
 *
 * Sources: xen/arch/x86/mm/mem_paging.c, xen/common/vm_event.c (Xen 4.17).
 */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include "host.h"

#define HYPERVISOR_NICE (-15)

void ring_put(struct sim_host_domain *h, uint64_t pfn, uint32_t vcpu, uint32_t flags,
              uint32_t type, uint32_t paging_flags)
{
    struct vm_event *req = vm_event_slot(h->ring, h->req_prod);
    uint32_t old = h->req_prod;

    memset(req, 0, sizeof(*req));
    req->version = VM_EVENT_INTERFACE_VERSION;
    req->reason = VM_EVENT_REASON_MEM_PAGING;
    req->flags = flags;
    req->vcpu_id = vcpu;
    req->gfn = pfn;
    req->p2mt = type;
    req->paging_flags = paging_flags;
    h->req_prod++;
    __atomic_store_n(&h->ring->req_prod, h->req_prod, __ATOMIC_SEQ_CST);
    /* RING_PUSH_REQUESTS_AND_CHECK_NOTIFY */
    if (h->req_prod - __atomic_load_n(&h->ring->req_event, __ATOMIC_SEQ_CST) < h->req_prod - old)
        wake_fd(h->to_pager_fd);
}

/* p2m_mem_paging_resume() and the unpause that follows it */
static void ring_take_responses(struct sim_host_domain *h)
{
    struct sim_domain *d = h->m->dom;
    uint32_t prod;

    if (!h->ring)
        return;
    prod = __atomic_load_n(&h->ring->rsp_prod, __ATOMIC_ACQUIRE);
    if (prod - h->rsp_cons > h->req_prod - h->rsp_cons)
        prod = h->req_prod;     /* never more responses than requests */
    while (h->rsp_cons != prod) {
        struct vm_event rsp = *vm_event_slot(h->ring, h->rsp_cons);

        h->rsp_cons++;
        if (rsp.version != VM_EVENT_INTERFACE_VERSION || rsp.reason != VM_EVENT_REASON_MEM_PAGING)
            continue;
        if (!(rsp.paging_flags & MEM_PAGING_DROP_PAGE) && rsp.gfn < d->nr_pfns) {
            uint32_t w = __atomic_load_n(&h->m->p2m[rsp.gfn], __ATOMIC_SEQ_CST);

            if (is_paging(E_TYPE(w)))
                d->premature_responses++;
        }
        if (rsp.flags & VM_EVENT_FLAG_VCPU_PAUSED) {
            if (rsp.vcpu_id < d->nr_vcpus && h->vcpu[rsp.vcpu_id].event_pause) {
                h->vcpu[rsp.vcpu_id].event_pause--;
                pthread_cond_signal(&h->vcpu[rsp.vcpu_id].wake);
            } else {
                d->spurious_responses++;
            }
        }
    }
    for (uint32_t i = 0; i < d->nr_vcpus; i++)
        if (h->vcpu[i].state == VCPU_WAIT_SLOT)
            pthread_cond_signal(&h->vcpu[i].wake);
}

static void *responder_main(void *arg)
{
    struct sim_host_domain *h = arg;
    struct pollfd fds[2] = { { .fd = h->from_pager_fd, .events = POLLIN },
                             { .fd = h->stop_fd, .events = POLLIN } };

    pthread_setname_np(pthread_self(), "hypervisor");
    /* This thread is the hypervisor, which no process preempts on a real host. */
    setpriority(PRIO_PROCESS, syscall(SYS_gettid), HYPERVISOR_NICE);
    for (;;) {
        uint64_t count;

        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (fds[1].revents)
            return NULL;
        if (!(fds[0].revents & POLLIN))
            continue;
        if (read(h->from_pager_fd, &count, sizeof(count)) < 0)
            continue;
        pthread_mutex_lock(&h->lock);
        ring_take_responses(h);
        pthread_mutex_unlock(&h->lock);
    }
}

static void note_stall(struct sim_vcpu *v, uint64_t ns)
{
    uint64_t us = ns / 1000;
    unsigned bucket;

    v->block_ns += ns;
    if (ns > v->max_block_ns)
        v->max_block_ns = ns;
    if (us < 8) {
        bucket = us;
    } else {
        unsigned log = 63 - __builtin_clzll(us);

        bucket = (log - 2) * 8 + (us >> (log - 3) & 7);
    }
    v->stalls[bucket < SIM_STALL_BUCKETS ? bucket : SIM_STALL_BUCKETS - 1]++;
}

void page_fault(struct host_vcpu *v, uint64_t pfn)
{
    struct sim_host_domain *h = v->h;
    struct sim_domain *d = h->m->dom;
    struct sim_vcpu *stats = &d->vcpu[v->id];
    uint64_t start = now_ns();
    uint32_t w, type, flags = 0;

    pthread_mutex_lock(&h->lock);
    while (h->ring && !ring_slots_free(h) && !h->exiting) {
        set_state(v, VCPU_WAIT_SLOT);
        pthread_cond_wait(&v->wake, &h->lock);
    }
    set_state(v, VCPU_RUNNING);
    if (h->exiting) {
        pthread_mutex_unlock(&h->lock);
        return;
    }
    if (!h->ring) {
        crash(h, v->id, CRASH_NO_RING, pfn);
        pthread_mutex_unlock(&h->lock);
        return;
    }
    w = entry_lock(h->m, pfn);
    type = E_TYPE(w);
    if (!is_paging(type)) {     /* loaded meanwhile */
        entry_unlock(h->m, pfn);
        pthread_mutex_unlock(&h->lock);
        return;
    }
    if (type == P2M_RAM_PAGING_OUT) {
        flags = MEM_PAGING_EVICT_FAIL;      /* the frame is still present */
        entry_set(h->m, pfn, P2M_RAM_RW, !!(w & E_TOUCHED), 1);
    } else {
        entry_set(h->m, pfn, P2M_RAM_PAGING_IN, 0, 1);
    }
    v->event_pause = 1;
    ring_put(h, pfn, v->id, VM_EVENT_FLAG_VCPU_PAUSED, type, flags);
    /* On the real Xen a vCPU whose page tables are paged out requests one page up to six times: by
     * its own access, and by the hypervisor's accesses on behalf of the vCPU.  All requests have to
     * be answered before the vCPU continues. */
    for (uint64_t more = !flags && stats->faults < 16 ? stats->faults % 7 : 0;
         more && ring_slots_free(h); more--) {
        v->event_pause++;
        ring_put(h, pfn, v->id, VM_EVENT_FLAG_VCPU_PAUSED, P2M_RAM_PAGING_IN, 0);
    }
    set_state(v, VCPU_WAIT_PAGE);
    while (v->event_pause && !h->exiting)
        pthread_cond_wait(&v->wake, &h->lock);
    set_state(v, VCPU_RUNNING);
    pthread_mutex_unlock(&h->lock);
    stats->faults++;
    note_stall(stats, now_ns() - start);
}

void sim_host_paging_enable(struct sim_host_domain *h, void *ring_page, int to_pager_fd,
                            int from_pager_fd)
{
    pthread_mutex_lock(&h->lock);
    h->ring = ring_page;
    memset(h->ring, 0, PAGE_BYTES);
    h->ring->req_event = h->ring->rsp_event = 1;    /* SHARED_RING_INIT */
    h->req_prod = h->rsp_cons = 0;
    h->to_pager_fd = to_pager_fd;
    h->from_pager_fd = from_pager_fd;
    h->stop_fd = eventfd(0, EFD_CLOEXEC);
    pthread_create(&h->responder, NULL, responder_main, h);
    __atomic_store_n(&h->m->dom->paging, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&h->lock);
}

/* XEN_VM_EVENT_DISABLE: refused while a vCPU waits for a slot.  A vCPU that waits for an answer
 * continues to wait, because only a response undoes vm_event_vcpu_pause().  The domain is paused
 * meanwhile, as by domain_pause(), so that no vCPU is between finding a page absent and requesting
 * it. */
int paging_disable(struct sim_host_domain *h)
{
    pthread_mutex_lock(&h->lock);
    if (!h->ring) {
        pthread_mutex_unlock(&h->lock);
        return 0;
    }
    for (uint32_t i = 0; i < h->m->dom->nr_vcpus && !h->exiting; i++)
        if (h->vcpu[i].state == VCPU_WAIT_SLOT) {
            pthread_mutex_unlock(&h->lock);
            return -EBUSY;
        }
    ring_take_responses(h);     /* responses before the disable count */
    __atomic_store_n(&h->m->dom->paging, 0, __ATOMIC_SEQ_CST);
    h->ring = NULL;
    wake_all(h);
    pthread_mutex_unlock(&h->lock);
    wake_fd(h->stop_fd);
    pthread_join(h->responder, NULL);
    close(h->stop_fd);
    return 0;
}

int sim_host_paging_disable(struct sim_host_domain *h)
{
    int rc;

    sim_host_pause(h);
    rc = paging_disable(h);
    sim_host_unpause(h);
    return rc;
}
