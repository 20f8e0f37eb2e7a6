/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vCPUs: native threads that run a guest program against the simulated MMU, and the
 * hypervisor's end of the paging ring.
 *
 * A vCPU runs one access after the other.  Between two it can be paused; while it waits for a page or for
 * a slot in the ring it counts as not running, and when the answer comes it looks
 * first whether it is paused, as a real one does.  An access is done entirely or not at all, so `count` is
 * all that a vCPU's context has to hold, and so is a step of the balloon, which vCPU 0 moves.
 *
 * Log-dirty is marked *after* the write and before the access is over.  A page cleaned between the two is marked
 * again; marked before, the write could land behind the copy and be lost.
 *
 * The threads run at a lower priority: a guest's vCPUs do not take the CPUs from dom0's
 * daemons on a real host, and here they share a few.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "internal.h"
#include "../../native/vm_event.h"

#define VCPU_NICE 10
#define HYPERVISOR_NICE (-15)

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
    pthread_cond_t settled;     /* some vCPU changed its state: for who waits in pause */
    uint32_t pause;             /* read without the lock by running vCPUs */
    int exiting;
    int started;
    struct host_vcpu vcpu[SIM_MAX_VCPUS];

    struct vm_event_sring *ring;    /* NULL: paging is off */
    uint32_t req_prod, rsp_cons;    /* the front end's private indices */
    int to_pager_fd, from_pager_fd, stop_fd;
    pthread_t responder;
};

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void wake_fd(int fd)
{
    uint64_t one = 1;

    while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

static int stopping(struct sim_host_domain *h)
{
    return __atomic_load_n(&h->pause, __ATOMIC_SEQ_CST) != 0;
}

static void set_state(struct host_vcpu *v, enum vcpu_state state)
{
    v->state = state;
    pthread_cond_broadcast(&v->h->settled);
}

static void wake_all(struct sim_host_domain *h)
{
    for (uint32_t i = 0; i < h->m->dom->nr_vcpus; i++)
        pthread_cond_signal(&h->vcpu[i].wake);
}

/* The guest dies; like a crashed domain it is kept for inspection, its vCPUs standing still.  Locked. */
static void crash(struct sim_host_domain *h, uint32_t vcpu, uint32_t reason, uint64_t pfn)
{
    struct sim_domain *d = h->m->dom;

    if (!d->crash) {
        d->crash_vcpu = vcpu;
        d->crash_pfn = pfn;
        __atomic_store_n(&d->crash, reason, __ATOMIC_SEQ_CST);      /* last: other processes look at it */
    }
    __atomic_fetch_or(&h->pause, 0x80000000u, __ATOMIC_SEQ_CST);
}

/* -------- the front end of the paging ring; under h->lock -------- */

static int ring_slots_free(struct sim_host_domain *h)
{
    return VM_EVENT_SLOTS - (h->req_prod - h->rsp_cons);
}

static void ring_put(struct sim_host_domain *h, uint64_t pfn, uint32_t vcpu, uint32_t flags,
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

    /* On a real host this is the hypervisor: no process goes before it. */
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

/* p2m_mem_paging_populate(): tell the pager, and stand still until it has answered. */
static void page_fault(struct host_vcpu *v, uint64_t pfn)
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
        flags = MEM_PAGING_EVICT_FAIL;      /* the frame is still there: nothing to bring in */
        entry_set(h->m, pfn, P2M_RAM_RW, !!(w & E_TOUCHED), 1);
    } else {
        entry_set(h->m, pfn, P2M_RAM_PAGING_IN, 0, 1);
    }
    v->event_pause = 1;
    ring_put(h, pfn, v->id, VM_EVENT_FLAG_VCPU_PAUSED, type, flags);
    /* On the real Xen a vCPU asks for one page up to six times while its page tables are out: its own access, then the
     * hypervisor's to what it keeps up to date for the vCPU.  Each is to be answered before the vCPU goes on. */
    for (uint64_t more = stats->faults < 16 ? stats->faults % 7 : 0; !flags && more && ring_slots_free(h); more--) {
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

static void crash_at(struct host_vcpu *v, uint64_t pfn)
{
    pthread_mutex_lock(&v->h->lock);
    crash(v->h, v->id, CRASH_BAD_ACCESS, pfn);
    pthread_mutex_unlock(&v->h->lock);
}

/* The guest has looked at a page that its balloon gives away: it must hold what was written there. */
static void check_page(struct host_vcpu *v, uint64_t pfn, uint64_t number)
{
    struct sim_domain *d = v->h->m->dom;
    uint64_t taken = sim_balloon_taken(&d->program, d->balloon_steps, number);
    const uint64_t *words = (const uint64_t *)(v->h->m->memory + pfn * PAGE_BYTES);
    int wrong = 0;

    if (!taken && !d->program.generated)
        return;
    for (uint32_t w = 0; w < PAGE_BYTES / 8; w++)
        wrong |= words[w] != (taken ? sim_taken_word(&d->program, pfn, taken, w) : sim_image_word(&d->program, pfn, w));
    if (wrong && !d->vcpu[v->id].errors++)
        d->vcpu[v->id].first_error_pfn = pfn;
}

/* The guest's balloon driver: decrease_reservation of a page.  Xen 4.17.5 refuses one that is paged out (EILSEQ,
 * p2m_remove_entry()), and Linux scrubs pages that it gives away, which brings them in first.  With ``drops`` it is as
 * the interface has it: the page is let go of, and the pager told.  Returns 0 where it has to be tried again. */
static int give_away(struct host_vcpu *v, uint64_t pfn, uint64_t number)
{
    struct sim_host_domain *h = v->h;
    struct sim_domain *d = h->m->dom;
    uint32_t w = entry_lock(h->m, pfn);

    if (!d->drops && is_paging(E_TYPE(w))) {
        entry_unlock(h->m, pfn);
        page_fault(v, pfn);
        return 0;
    }
    if (is_ram(E_TYPE(w)) || E_TYPE(w) == P2M_RAM_PAGING_OUT) {
        check_page(v, pfn, number);
        entry_set(h->m, pfn, P2M_HOLE, 0, 0);
        sim_free_frames(h->m, pfn, 1);
        __atomic_fetch_sub(&d->tot_pages, 1, __ATOMIC_SEQ_CST);
        physmap_changed(h->m, pfn, 0);
        entry_unlock(h->m, pfn);
    } else if (is_paging(E_TYPE(w))) {
        entry_set(h->m, pfn, P2M_HOLE, 0, 1);
        __atomic_fetch_sub(&d->paged_pages, 1, __ATOMIC_SEQ_CST);
        /* p2m_mem_paging_drop_page() does not wait for a slot: where the ring is full the pager is
         * never told, and finds out when it loads the page. */
        pthread_mutex_lock(&h->lock);
        if (h->ring && ring_slots_free(h))
            ring_put(h, pfn, v->id, 0, E_TYPE(w), MEM_PAGING_DROP_PAGE);
        else
            d->lost_drops++;
        pthread_mutex_unlock(&h->lock);
    } else {
        entry_unlock(h->m, pfn);
        crash_at(v, pfn);
        return 0;
    }
    return 1;
}

/* And populate_physmap.  Xen puts the frame over whatever is there; a frame that was there is lost to the domain.
 * Returns 0 where the domain may own no further frame: as Linux does, the guest tries again later. */
static int take_back(struct host_vcpu *v, uint64_t pfn, uint64_t number)
{
    struct sim_map *m = v->h->m;
    struct sim_domain *d = m->dom;
    uint64_t taken = sim_balloon_taken(&d->program, d->balloon_steps + 1, number);
    uint64_t *words = (uint64_t *)(m->memory + pfn * PAGE_BYTES);
    uint32_t w;

    if (!get_frame(m))
        return 0;
    w = entry_lock(m, pfn);
    d->overlaid += E_TYPE(w) != P2M_HOLE;
    if (is_paging(E_TYPE(w)) && E_TYPE(w) != P2M_RAM_PAGING_OUT)
        __atomic_fetch_sub(&d->paged_pages, 1, __ATOMIC_SEQ_CST);
    entry_set(m, pfn, P2M_RAM_RW, 1, 0);
    physmap_changed(m, pfn, 1);
    for (uint32_t i = 0; i < PAGE_BYTES / 8; i++)
        __atomic_store_n(&words[i], sim_taken_word(&d->program, pfn, taken, i), __ATOMIC_RELAXED);
    mark_dirty(m, pfn);
    entry_unlock(m, pfn);
    return 1;
}

/* The next step of the balloon, where it is due.  It is done entirely or not at all; returns 0 if not yet. */
static int move_balloon(struct host_vcpu *v)
{
    struct sim_domain *d = v->h->m->dom;
    uint64_t number, pfn;
    int gives = sim_balloon_gives(&d->program, d->balloon_steps, &number);

    pfn = sim_balloon_pfn(&d->program, d->nr_pfns, number);
    if (!(gives ? give_away(v, pfn, number) : take_back(v, pfn, number)))
        return !gives;
    __atomic_store_n(&d->balloon_steps, d->balloon_steps + 1, __ATOMIC_SEQ_CST);
    return 1;
}

/* -------- the vCPU's loop -------- */

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

/* One access to memory; returns 0 when it has to be tried again. */
static int access_page(struct host_vcpu *v, struct sim_access a)
{
    struct sim_map *m = v->h->m;
    const struct sim_program *p = &m->dom->program;
    struct sim_vcpu *arch = &m->dom->vcpu[v->id];
    uint32_t w = __atomic_fetch_add(&m->p2m[a.pfn], E_ACCESS, __ATOMIC_SEQ_CST);

    if (is_ram(E_TYPE(w)) && !E_OWNER(w)) {
        uint64_t *words = (uint64_t *)(m->memory + a.pfn * PAGE_BYTES);
        uint64_t n = sim_writes(p, v->id, a.pfn, a.visit);
        int wrong = 0;

        if (n) {
            wrong = words[sim_word(p, v->id, a.pfn, n - 1)] != sim_value(p, v->id, a.pfn, n - 1);
        } else if (p->generated) {
            uint32_t word = sim_word(p, v->id, a.pfn, 0);

            wrong = words[word] != sim_image_word(p, a.pfn, word);
        }
        if (wrong && !arch->errors++)
            arch->first_error_pfn = a.pfn;
        if (sim_writes(p, v->id, a.pfn, a.visit + 1) != n) {
            if (!(w & E_TOUCHED))
                __atomic_fetch_or(&m->p2m[a.pfn], E_TOUCHED, __ATOMIC_SEQ_CST);
            __atomic_store_n(&words[sim_word(p, v->id, a.pfn, n)], sim_value(p, v->id, a.pfn, n), __ATOMIC_SEQ_CST);
            mark_dirty(m, a.pfn);
        }
        __atomic_fetch_sub(&m->p2m[a.pfn], E_ACCESS, __ATOMIC_SEQ_CST);
        return 1;
    }
    __atomic_fetch_sub(&m->p2m[a.pfn], E_ACCESS, __ATOMIC_SEQ_CST);
    if (E_OWNER(w))
        sched_yield();
    else if (is_paging(E_TYPE(w)))
        page_fault(v, a.pfn);
    else
        crash_at(v, a.pfn);
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
            continue;       /* tried again, after a pause if there is one */
        if (period)
            next = next + 100000000 < now_ns() ? now_ns() : next + period;  /* catch up 0.1 s at most */
        if (!arch->first_instruction_ns)
            arch->first_instruction_ns = now_ns();
        __atomic_store_n(&arch->count, arch->count + 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* -------- what the host's process calls -------- */

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

/* What Linux does first in a new place: register each vCPU's vcpu_info frame by number.  The hypervisor
 * takes a reference to it, and answers EINVAL for a frame that is not there. */
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

void sim_host_paging_enable(struct sim_host_domain *h, void *ring_page, int to_pager_fd, int from_pager_fd)
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

/* XEN_VM_EVENT_DISABLE: refused while a vCPU waits for a slot.  One that waits for an answer goes on waiting: nothing
 * undoes vm_event_vcpu_pause() but a response.  The domain is paused meanwhile, as by domain_pause(), so that no vCPU is
 * between finding a page absent and asking for it. */
static int paging_disable(struct sim_host_domain *h)
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
    ring_take_responses(h);     /* those given before the disable count */
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
    h->pause = 1;               /* a new domain is paused, by its builder */
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->settled, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    for (uint32_t i = 0; i < m->dom->nr_vcpus; i++) {
        h->vcpu[i].h = h;
        h->vcpu[i].id = i;
        pthread_cond_init(&h->vcpu[i].wake, &monotonic);
    }
    sigfillset(&all);           /* signals are the Python threads' */
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
