/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A postcopy migration on the simulated hypervisor without Python, for ThreadSanitizer: the threads
 * and locks of the daemons around the fast path, ring.c, bulk.c, hypercalls.c and vcpu.c.
 *
 *   vCPUs      run the guest at the destination, and fault
 *   pager      ring -> fault -> page -> load -> ring (fault_wait), and the slow path
 *   server     fault -> page (fault_serve)
 *   pusher     pages that were not requested, in batches
 *   loader     loads these batches
 *   evictor    when all pages have arrived, puts some back to the source, round by round; some
 *              evictions fail
 *
 * Each page must then have what the guest's program has written.  In the end the guest crashes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include "kinds.h"
#include "ring_api.h"
#include "../../../migrate/lanes/native/bulk_api.h"
#include "../../../migrate/fastpath/native/page_states.h"
#include "../../../migrate/fastpath/native/fault_api.h"
#include "../../../xenbackend/simulated/native/internal.h"

#define VCPUS 3
#define PAGES 512ull /* the pages that the guest uses */
#define BALLOON 64   /* further pages, which it gives away */
#define MISSING (PAGES + BALLOON)
#define NR_PFNS (MISSING + VCPUS)
#define BATCH 8
#define BUFFER_BYTES (64 << 10)
#define ROUNDS 12
#define EVICTIONS 200 /* the evictions that are tried in each round */
#define PING "ping"   /* no frame, so each end leaves it to the caller */

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))

static void fail(int line, const char *what)
{
    fprintf(stderr, "migration.c:%d: not so: %s\n", line, what);
    _exit(1);
}

static const struct sim_program program = {
    .kind = PROGRAM_RANDOM,
    .nr_vcpus = VCPUS,
    .seed = 1,
    .pages = PAGES,
    .write_permille = 500,
    .generated = 1,
    .balloon_pages = BALLOON,
    .balloon_every = 50,
    .image_seed = 2,
    .zero_permille = 200,
};

/* ---- the hosts ---- */
static struct sim_map at_source, at_destination;

static void make_domain(struct sim_map *m)
{
    int control = memfd_create("control", 0), memory = memfd_create("memory", 0);

    CHECK(!ftruncate(control, sim_control_bytes(NR_PFNS)) &&
          !ftruncate(memory, NR_PFNS * PAGE_BYTES));
    CHECK(!sim_attach(m, control, memory, SIM_HOST_OWNER));
    close(control);
    m->dom->magic = SIM_MAGIC;
    m->dom->nr_pfns = m->dom->max_pages = NR_PFNS;
    m->dom->nr_vcpus = VCPUS;
    m->dom->program = program;
    for (uint64_t vcpu = 0; vcpu < VCPUS; vcpu++)
        m->dom->vcpu[vcpu].vcpu_info_pfn = NR_PFNS - 1 - vcpu;
    for (uint64_t pfn = 0; pfn < NR_PFNS; pfn++)
        m->p2m[pfn] = P2M_HOLE;
}

/* The same memory for another process.  A second mapping would hide from ThreadSanitizer that it is
 * the same. */
static struct sim_map seen_by(const struct sim_map *m, uint32_t owner)
{
    struct sim_map other = *m;

    other.owner = owner;
    return other;
}

/* ---- the sender ---- */
static struct fault_source source;
static struct source_pages backlog;
static uint8_t source_state[NR_PFNS];
static int64_t left[1];
static struct sim_map server_map, pusher_map, loader_map, pager_map, evictor_map;
static int push_from, push_to;
static uint32_t stopping;
static uint64_t pushed, loaded; /* numbers of batches: under backlog.lock; atomic */
static uint32_t pongs;

static int is_stopping(void) { return __atomic_load_n(&stopping, __ATOMIC_ACQUIRE); }

static int look_at(void *domain, uint64_t pfn, const void **page)
{
    return sim_look_at(domain, pfn, page);
}
static int load_at(void *domain, uint64_t pfn, const void *page)
{
    return sim_load_at(domain, pfn, page);
}
static int consume(void *ring, struct ring_request *out) { return ring_consume(ring, out); }
/* Locked, as evictions are: no page is evicted between this check and the answer.  A page may be
 * nominated at any time, and has its contents then.  The hypervisor takes the answer later, when
 * the page may be paged out again, so its own count of early answers is ignored. */
static int respond(void *ring, const struct ring_request *answers, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t type = E_TYPE(
            __atomic_load_n(&at_destination.p2m[answers[i].gfn], __ATOMIC_SEQ_CST));

        CHECK(type != P2M_RAM_PAGED && type != P2M_RAM_PAGING_IN);
    }
    return ring_respond(ring, answers, n);
}

static void *server_main(void *arg)
{
    void *buffer = malloc(BUFFER_BYTES);
    long got;

    (void)arg;
    CHECK(buffer);
    while ((got = fault_serve(&source, buffer, BUFFER_BYTES, 1)) > 0) {
        CHECK(got == sizeof(PING) && !memcmp(buffer, PING, sizeof(PING)));
        CHECK(send(source.lane.fd, PING, sizeof(PING), MSG_NOSIGNAL) == sizeof(PING));
    }
    CHECK(got == 0); /* the connection's end */
    free(buffer);
    return NULL;
}

struct batch {
    uint64_t n;
    uint64_t pfns[BATCH];
    uint8_t pages[BATCH][PAGE_BYTES];
};

static void *pusher_main(void *arg)
{
    struct batch *batch = malloc(sizeof(*batch));

    (void)arg;
    CHECK(batch);
    while (!is_stopping()) {
        struct bulk_piece piece = { batch, sizeof(*batch) };

        batch->n = 0;
        fault_lock_take(backlog.lock);
        for (uint64_t tried = 0; tried < NR_PFNS && backlog.unsent && batch->n < BATCH; tried++) {
            uint64_t pfn = (backlog.cursor + tried) % NR_PFNS;

            if (source_state[pfn] == PAGE_UNSENT)
                batch->pfns[batch->n++] = pfn;
        }
        source_sent(&backlog, batch->pfns, batch->n);
        pushed += batch->n != 0;
        fault_lock_give(backlog.lock);
        for (uint64_t i = 0; i < batch->n; i++)
            memcpy(batch->pages[i], pusher_map.memory + batch->pfns[i] * PAGE_BYTES, PAGE_BYTES);
        if (batch->n)
            CHECK(!bulk_send(push_from, &piece, 1));
        usleep(2000); /* so that there are faults */
    }
    shutdown(push_from, SHUT_WR);
    free(batch);
    return NULL;
}

/* ---- the receiver ---- */
static struct fault_pager pager;
static struct destination_pages outstanding;
static struct ring_state ring;
static uint8_t ring_page[PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
static uint8_t state[NR_PFNS];

/* Called under the lock, as in Python. */
static void answer(const struct page_actions *actions)
{
    struct ring_request answers[FAULT_SLOTS];

    for (uint32_t i = 0; i < actions->nr_answers; i++)
        answers[i] = actions->answer[i].request;
    if (actions->nr_answers)
        CHECK(!respond(&ring, answers, actions->nr_answers));
}

static void *loader_main(void *arg)
{
    struct batch *batch = malloc(sizeof(*batch));

    (void)arg;
    CHECK(batch);
    while (bulk_receive(push_to, batch, sizeof(*batch), 0) == sizeof(*batch)) {
        struct page_actions actions;
        uint8_t wanted[BATCH];

        fault_lock_take(outstanding.lock);
        CHECK(destination_claim(&outstanding, batch->pfns, batch->n, wanted) == batch->n);
        fault_lock_give(outstanding.lock);
        for (uint64_t i = 0; i < batch->n; i++) {
            int32_t result;

            if (!wanted[i])
                continue;
            CHECK(sim_load(&loader_map, &batch->pfns[i], 1, batch->pages[i], &result) == 1);
            fault_lock_take(outstanding.lock);
            destination_finish(&outstanding, &batch->pfns[i], &result, 1, &actions);
            answer(&actions);
            fault_lock_give(outstanding.lock);
        }
        __atomic_add_fetch(&loaded, 1, __ATOMIC_RELEASE);
    }
    free(batch);
    return NULL;
}

static void *pager_main(void *arg)
{
    void *buffer = malloc(BUFFER_BYTES);

    (void)arg;
    CHECK(buffer);
    for (int rc = 0; !(rc & FAULT_STOPPED);) {
        rc = fault_wait(&pager, buffer, BUFFER_BYTES);
        CHECK(rc >= 0);
        if (rc & FAULT_LANE) {
            CHECK(pager.received == sizeof(PING) && !memcmp(buffer, PING, sizeof(PING)));
            __atomic_add_fetch(&pongs, 1, __ATOMIC_RELEASE);
        }
        CHECK(!(rc & FAULT_RING));
    }
    free(buffer);
    return NULL;
}

/* Whether all pages are here, and no copy of any is in transit. */
static void wait_for_all(uint32_t round)
{
    for (int all = 0; !all; usleep(1000)) {
        uint64_t sent;

        fault_lock_take(backlog.lock);
        all = !backlog.unsent;
        sent = pushed;
        fault_lock_give(backlog.lock);
        all = all && __atomic_load_n(&loaded, __ATOMIC_ACQUIRE) == sent;
        fault_lock_take(outstanding.lock);
        for (uint64_t pfn = 0; all && pfn < MISSING; pfn++)
            all = state[pfn] == PAGE_READY;
        fault_lock_give(outstanding.lock);
    }
    fault_lock_take(backlog.lock);
    memset(source_state, PAGE_DONE, MISSING);
    fault_lock_give(backlog.lock);
    fault_lock_take(pager.lane.sending);
    CHECK(send(pager.lane.fd, PING, sizeof(PING), MSG_NOSIGNAL) == sizeof(PING));
    fault_lock_give(pager.lane.sending);
    while (__atomic_load_n(&pongs, __ATOMIC_ACQUIRE) <= round)
        usleep(1000);
}

/* Nominate, copy, evict.  If a vCPU touches the page in between, it is present again, and the
 * eviction fails. */
static int put_back(uint64_t pfn, int slowly)
{
    uint64_t *from = (uint64_t *)(evictor_map.memory + pfn * PAGE_BYTES);
    uint64_t *to = (uint64_t *)(at_source.memory + pfn * PAGE_BYTES);
    int rc, once;

    fault_lock_take(backlog.lock);
    once = source_state[pfn] == PAGE_DONE; /* otherwise a copy may still be in transit */
    fault_lock_give(backlog.lock);
    if (!once)
        return 0;
    if (sim_nominate(&evictor_map, pfn))
        return -1;
    if (slowly)
        usleep(300);
    /* The guest may write meanwhile.  Then the page is not evicted, and this copy is not used. */
    for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
    fault_lock_take(outstanding.lock);
    rc = sim_evict(&evictor_map, pfn);
    if (!rc) {
        fault_lock_take(backlog.lock);
        source_state[pfn] = PAGE_UNSENT;
        left[0]++;
        backlog.unsent++;
        fault_lock_give(backlog.lock);
        state[pfn] = PAGE_OUTSTANDING;
    }
    fault_lock_give(outstanding.lock);
    return rc;
}

static void *evictor_main(void *arg)
{
    uint64_t random = 1;
    int failed = 0;

    (void)arg;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        wait_for_all(round);
        for (int n = 0; n < EVICTIONS; n++) {
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            failed += put_back((random >> 33) % PAGES, n % 8 == 0) != 0;
        }
    }
    wait_for_all(ROUNDS);
    printf("%d evictions, %d of them failed\n", ROUNDS * EVICTIONS, failed);
    return NULL;
}

/* ---- all of it ---- */
static void compare(void)
{
    uint64_t *visits = calloc(VCPUS * PAGES, sizeof(*visits)), steps = 0, differing = 0;
    /* by the balloon, which this guest does not have */
    uint64_t *taken = calloc(PAGES, sizeof(*taken));
    uint8_t *pages = malloc(PAGES * PAGE_BYTES), *differs = malloc(PAGES);

    CHECK(visits && taken && pages && differs);
    for (uint32_t vcpu = 0; vcpu < VCPUS; vcpu++) {
        CHECK(!at_destination.dom->vcpu[vcpu].errors);
        steps += at_destination.dom->vcpu[vcpu].count;
        sim_expected_visits(&program, vcpu, at_destination.dom->vcpu[vcpu].count,
                            visits + vcpu * PAGES);
    }
    sim_image_pages(&program, 0, PAGES, pages);
    sim_compare_pages(&program, 0, PAGES, visits, taken, pages, at_destination.memory, differs);
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        differing += differs[pfn];
    printf("%lu steps, %lu pages differ\n", (unsigned long)steps, (unsigned long)differing);
    CHECK(steps > PAGES && !differing);
    CHECK(!at_destination.dom->crash);
    CHECK(!at_destination.dom->spurious_responses);
    free(differs);
    free(pages);
    free(taken);
    free(visits);
}

static const struct fault_frame fault = FAULT_KIND, page = PAGE_KIND, zero = ZERO_KIND;
static uint64_t pfns[NR_PFNS];

/* All pages are at the source at first, and missing at the destination. */
static void make_domains(void)
{
    make_domain(&at_source);
    make_domain(&at_destination);
    server_map = seen_by(&at_source, 1);
    pusher_map = seen_by(&at_source, 2);
    pager_map = seen_by(&at_destination, 1);
    loader_map = seen_by(&at_destination, 2);
    evictor_map = seen_by(&at_destination, 3);
    for (uint64_t pfn = 0; pfn < NR_PFNS; pfn++) {
        pfns[pfn] = pfn;
        source_state[pfn] = pfn < MISSING ? PAGE_UNSENT : PAGE_NOT_MISSING;
        state[pfn] = pfn < MISSING ? PAGE_OUTSTANDING : PAGE_PRESENT;
        at_source.p2m[pfn] = P2M_RAM_RW | E_TOUCHED;
    }
    left[0] = MISSING;
    sim_generate_image(&at_source, 0, MISSING);
}

static void make_sender(int pull, int push)
{
    backlog = (struct source_pages){
        .lock = fault_lock_new(),
        .state = source_state,
        .nr_pfns = NR_PFNS,
        .left = left,
        .unsent = MISSING,
    };
    source = (struct fault_source){
        .lane = { .fd = pull,
                  .sending = fault_lock_new(),
                  .fault = fault,
                  .page = page,
                  .zero = zero },
        .domain = &server_map,
        .look = look_at,
        .pages = &backlog,
    };
    push_from = push;
}

static void make_receiver(int pull, int push, int wake, int to_pager, int from_pager)
{
    outstanding = (struct destination_pages){
        .lock = fault_lock_new(),
        .state = state,
        .nr_pfns = NR_PFNS,
    };
    pager = (struct fault_pager){
        .lane = { .fd = pull,
                  .sending = fault_lock_new(),
                  .fault = fault,
                  .page = page,
                  .zero = zero },
        .wake_fd = wake,
        .ring_fd = to_pager,
        .ring = &ring,
        .consume = consume,
        .respond = respond,
        .domain = &pager_map,
        .load = load_at,
        .pages = &outstanding,
    };
    ring = (struct ring_state){ .page = ring_page, .event_fd = to_pager, .notify_fd = from_pager };
    push_to = push;
}

/* Runs until the evictor has ended; then all threads have ended, and the guest is paused. */
static void migrate(struct sim_host_domain *host, int wake, int end)
{
    pthread_t server, pusher, loader, pager_thread, evictor;

    pthread_create(&server, NULL, server_main, NULL);
    pthread_create(&pager_thread, NULL, pager_main, NULL);
    pthread_create(&loader, NULL, loader_main, NULL);
    fault_lane_open(&source.lane); /* while they wait, as the daemons do */
    fault_lane_open(&pager.lane);
    CHECK(!sim_host_resume_guest(host));
    sim_host_unpause(host);
    pthread_create(&pusher, NULL, pusher_main, NULL);
    pthread_create(&evictor, NULL, evictor_main, NULL);

    pthread_join(evictor, NULL);
    sim_host_pause(host);
    __atomic_store_n(&stopping, 1, __ATOMIC_RELEASE);
    pthread_join(pusher, NULL);
    pthread_join(loader, NULL);
    CHECK(write(wake, &(uint64_t){ 1 }, 8) == 8);
    pthread_join(pager_thread, NULL);
    shutdown(end, SHUT_RDWR);
    pthread_join(server, NULL);
}

int main(void)
{
    int to_pager = eventfd(0, EFD_NONBLOCK), from_pager = eventfd(0, EFD_NONBLOCK),
        wake = eventfd(0, EFD_NONBLOCK);
    int pull[2], push[2];
    size_t done;
    struct sim_host_domain *host;

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pull) &&
          !socketpair(AF_UNIX, SOCK_STREAM, 0, push));
    make_domains();
    make_sender(pull[0], push[0]);
    make_receiver(pull[1], push[1], wake, to_pager, from_pager);

    host = sim_host_new(&at_destination);
    CHECK(host);
    sim_host_paging_enable(host, ring_page, to_pager, from_pager);
    ring_begin(&ring, 0);
    CHECK(!sim_populate(&pager_map, pfns + MISSING, VCPUS, &done));
    CHECK(!sim_populate_evicted(&pager_map, pfns, MISSING, &done));
    migrate(host, wake, pull[1]);
    compare();
    /* The guest loses its memory, so all vCPUs crash it at once. */
    sim_host_unpause(host);
    CHECK(!sim_depopulate(&evictor_map, pfns, PAGES, &done) && done == PAGES);
    while (!__atomic_load_n(&at_destination.dom->crash, __ATOMIC_ACQUIRE))
        usleep(1000);
    CHECK(!sim_host_paging_disable(host));
    CHECK(at_destination.dom->crash == CRASH_BAD_ACCESS && at_destination.dom->crash_pfn < PAGES);
    sim_host_free(host);
    return 0;
}
