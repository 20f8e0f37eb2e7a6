/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * xenbackend/libxenctrl/native/one_page.c for ThreadSanitizer, with a hypervisor that is a few
 * functions.
 *
 *   lookers    read held pages, and pages that they map themselves, as the fault servers of the
 *              sender do
 *   keeper     unmaps held pages as soon as no thread reads them, and maps others in their place,
 *              as held.py does in Python
 *   front end  puts requests into a ring, whose pager consumes and answers them
 *
 * "Unmapped" memory is overwritten here without any order of its own.  A looker that still reads it
 * has a race with that, and finds other contents.  The keeper's stores to the slots are atomic
 * here.  In Python numpy makes them, as single stores of words, which the processor does not put
 * before earlier ones (x86).
 */
#include <poll.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include "ring_api.h"
#include "../../../xenbackend/libxenctrl/native/internal.h"
#include "../../../xenbackend/native/vm_event.h"

#define GFNS (2 * CHUNK_PAGES)
#define LOOKERS 2
#define LOOKS 60000
#define REQUESTS 20000
#define WORDS (XC_PAGE_SIZE / 8)

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))

static void fail(int line, const char *what)
{
    fprintf(stderr, "held.c:%d: not so: %s\n", line, what);
    _exit(1);
}

/* ---- the hypervisor ---- */
static uint64_t memory[GFNS][WORDS]; /* as it is mapped; the first word of a page is its gfn's, the
                                        second the same */
static uint64_t mapped;

size_t xen_look(const void *const *pages, size_t n, uint8_t *status, struct xen_run *runs)
{
    const uint64_t *words = pages[0];

    CHECK(n == 1 && runs);
    *status = words[0] ? PAGE_DATA : PAGE_ZERO;
    return *status == PAGE_DATA;
}

int xen_map(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint8_t *status,
            const void **pages, struct xen_view *view)
{
    uint64_t *page = calloc(1, XC_PAGE_SIZE);

    (void)h;
    CHECK(page && n == 1 && domid == 7);
    page[0] = page[1] = gfns[0];
    *status = PAGE_DATA;
    *pages = page;
    *view = (struct xen_view){ page, 1 };
    __atomic_add_fetch(&mapped, 1, __ATOMIC_RELAXED);
    return 0;
}

int xen_unmap(struct xen_host *h, struct xen_view *view)
{
    (void)h;
    free(view->address);
    __atomic_sub_fetch(&mapped, 1, __ATOMIC_RELAXED);
    return 0;
}

int xen_load(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
             const uint8_t *pages, int32_t *results)
{
    (void)h;
    (void)domid;
    (void)pages;
    CHECK(n == 1);
    results[0] = gfns[0] % 2 ? -ENOENT : 0;
    return 0;
}

int xen_event_take(struct xen_pager *pager)
{
    uint64_t count;

    return read(pager->event_fd, &count, sizeof(count)) < 0 ? -errno : 0;
}

static int to_front_end;

int xen_event_notify(struct xen_pager *pager)
{
    (void)pager;
    return write(to_front_end, &(uint64_t){ 1 }, 8) < 0 ? -errno : 0;
}

/* ---- pages that stay mapped ---- */
static uint32_t slot[GFNS];
static uint64_t address[GFNS / CHUNK_PAGES];
static struct xen_held held = { .slot = slot, .address = address };
static uint32_t lookers_left = LOOKERS;

static void *looker_main(void *arg)
{
    struct xen_domain with = { .domid = 7, .held = &held }, without = { .domid = 7, .ring_gfn = 1 };
    uint64_t random = (uintptr_t)arg, seen = 0;

    for (int i = 0; i < LOOKS; i++) {
        struct xen_domain *d = i % 8 ? &with : &without;
        const void *page = NULL;
        int status;

        random = random * 6364136223846793005ull + 1442695040888963407ull;
        status = xen_look_at(d, (random >> 33) % GFNS, &page);
        if (status == PAGE_DATA) {
            const uint64_t *words = page;

            CHECK(words[0] == words[1] && words[0] == (random >> 33) % GFNS);
            seen++;
            xen_looked_at(d, page);
        } else {
            CHECK(status == PAGE_ZERO ||
                  status == (d == &with ? PAGE_BROKEN : PAGE_HOLE)); /* gfn 0 has zeros */
        }
        if (i % 64 == 0)
            usleep(20); /* so that at times no thread reads */
    }
    CHECK(seen > LOOKS / 16);
    CHECK(xen_load_at(&without, 2, NULL) == 0 && xen_load_at(&without, 3, NULL) == -ENOENT);
    __atomic_sub_fetch(&lookers_left, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void map_chunk(uint64_t chunk)
{
    for (uint64_t gfn = chunk * CHUNK_PAGES; gfn < (chunk + 1) * CHUNK_PAGES; gfn++)
        memory[gfn][0] = memory[gfn][1] = gfn;
    __atomic_store_n(&address[chunk], (uint64_t)(uintptr_t)memory[chunk * CHUNK_PAGES],
                     __ATOMIC_RELEASE);
    for (uint64_t gfn = chunk * CHUNK_PAGES; gfn < (chunk + 1) * CHUNK_PAGES; gfn++)
        __atomic_store_n(&slot[gfn], gfn, __ATOMIC_RELEASE);
}

static void *keeper_main(void *arg)
{
    uint64_t unmapped = 0;

    (void)arg;
    for (uint64_t chunk = 0; __atomic_load_n(&lookers_left, __ATOMIC_ACQUIRE); chunk ^= 1) {
        for (uint64_t gfn = chunk * CHUNK_PAGES; gfn < (chunk + 1) * CHUNK_PAGES; gfn++)
            __atomic_store_n(&slot[gfn], NOT_HELD, __ATOMIC_RELAXED);
        while (!xen_held_idle(&held))
            ;
        for (uint64_t gfn = chunk * CHUNK_PAGES; gfn < (chunk + 1) * CHUNK_PAGES; gfn++)
            memory[gfn][0] = 0xdead;
        unmapped++;
        map_chunk(chunk);
        usleep(100);
    }
    printf("%lu times unmapped\n", (unsigned long)unmapped);
    CHECK(unmapped > 10 && !held.looking);
    return NULL;
}

/* ---- the ring ---- */
static uint8_t ring_page[XC_PAGE_SIZE] __attribute__((aligned(XC_PAGE_SIZE)));
static struct ring_state ring = { .page = ring_page, .event_fd = -1, .notify_fd = -1 };
static struct xen_pager pager;

static int consume(void *r, void *out) { return ring_consume(r, out); }
static int respond(void *r, const void *answered, int n) { return ring_respond(r, answered, n); }

static int wait_for(int fd)
{
    struct pollfd fds = { .fd = fd, .events = POLLIN };

    return poll(&fds, 1, 30000) == 1;
}

static void *front_end_main(void *arg)
{
    struct vm_event_sring *sring = (void *)ring_page;
    uint32_t asked = 0, answered = 0;
    uint64_t count;

    (void)arg;
    while (answered < REQUESTS) {
        while (asked < REQUESTS && asked - answered < VM_EVENT_SLOTS) {
            struct vm_event *req = vm_event_slot(sring, asked);

            *req = (struct vm_event){ .version = VM_EVENT_INTERFACE_VERSION,
                                      .reason = VM_EVENT_REASON_MEM_PAGING,
                                      .gfn = asked };
            __atomic_store_n(&sring->req_prod, ++asked, __ATOMIC_SEQ_CST);
            if (asked - __atomic_load_n(&sring->req_event, __ATOMIC_SEQ_CST) < 1)
                CHECK(write(pager.event_fd, &(uint64_t){ 1 }, 8) == 8);
        }
        CHECK(wait_for(to_front_end) && read(to_front_end, &count, 8) == 8);
        for (uint32_t prod = __atomic_load_n(&sring->rsp_prod, __ATOMIC_ACQUIRE); answered != prod;
             answered++)
            CHECK(vm_event_slot(sring, answered)->version == VM_EVENT_INTERFACE_VERSION);
    }
    return NULL;
}

static void *pager_main(void *arg)
{
    struct xen_ring r = { .pager = &pager, .ring = &ring, .consume = consume, .respond = respond };
    struct ring_request requests[VM_EVENT_SLOTS];

    (void)arg;
    for (uint32_t next = 0; next < REQUESTS;) {
        int n;

        CHECK(wait_for(pager.event_fd));
        while ((n = xen_ring_consume(&r, requests)) > 0) {
            for (int i = 0; i < n; i++)
                CHECK(requests[i].gfn == next++);
            CHECK(!xen_ring_respond(&r, requests, n));
        }
        CHECK(!n);
    }
    return NULL;
}

int main(void)
{
    pthread_t lookers[LOOKERS], keeper, front_end, its_pager;

    for (uint64_t chunk = 0; chunk < GFNS / CHUNK_PAGES; chunk++)
        map_chunk(chunk);
    pager.event_fd = eventfd(0, EFD_NONBLOCK);
    to_front_end = eventfd(0, EFD_NONBLOCK);
    ring_begin(&ring, 0);
    for (uintptr_t i = 0; i < LOOKERS; i++)
        pthread_create(&lookers[i], NULL, looker_main, (void *)(i + 1));
    pthread_create(&keeper, NULL, keeper_main, NULL);
    pthread_create(&its_pager, NULL, pager_main, NULL);
    pthread_create(&front_end, NULL, front_end_main, NULL);
    for (int i = 0; i < LOOKERS; i++)
        pthread_join(lookers[i], NULL);
    pthread_join(keeper, NULL);
    pthread_join(front_end, NULL);
    pthread_join(its_pager, NULL);
    CHECK(!mapped);
    return 0;
}
