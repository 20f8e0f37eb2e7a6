/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The p2m entry: one 32-bit word for each pfn, changed only by atomic operations.
 *
 *   bits  0-3   p2m type
 *   bits  4-11  accesses in progress: vCPUs between the check of the type and the end of the access
 *               (Xen waits for these with a TLB flush)
 *   bits 12-17  extra references (foreign mappings, grants): evict answers EBUSY
 *   bits 18-22  type count (PGT_*): evict answers EBUSY
 *   bit  23     the frame was written since it was allocated (clear: all zeros, and
 *               reading it through a mapping would only allocate memory)
 *   bits 24-31  the holder of the entry (the gfn lock of Xen): 0 for none, or an attached
 *               process, so that the host can undo the half-done call of a dead process
 */
#ifndef SIM_INTERNAL_H
#define SIM_INTERNAL_H

#include <stddef.h>
#include <stdint.h>
#include <sched.h>
#include "api.h"

#define PAGE_BYTES 4096
#define E_TYPE(w) ((w) & 0xfu)
#define E_ACCESS 0x10u
#define E_ACCESSES(w) (((w) >> 4) & 0xffu)
#define E_REF 0x1000u
#define E_REFS(w) (((w) >> 12) & 0x3fu)
#define E_TYPE_REF 0x40000u
#define E_TYPE_REFS(w) (((w) >> 18) & 0x1fu)
#define E_TOUCHED P2M_TOUCHED
#define E_OWNER(w) ((w) >> 24)

static inline int is_ram(uint32_t type) { return type == P2M_RAM_RW || type == P2M_RAM_LOGDIRTY; }
static inline int is_paging(uint32_t type)
{
    return type == P2M_RAM_PAGING_OUT || type == P2M_RAM_PAGED || type == P2M_RAM_PAGING_IN;
}

static inline void relax(unsigned *spins)
{
    if (++*spins % 64 == 0)
        sched_yield();      /* the holder may be waiting for this CPU */
    else
        __builtin_ia32_pause();
}

/* Take the entry's lock.  Returns the word before that. */
static inline uint32_t entry_lock(struct sim_map *m, uint64_t pfn)
{
    unsigned spins = 0;

    for (;;) {
        uint32_t w = __atomic_load_n(&m->p2m[pfn], __ATOMIC_RELAXED);

        if (E_OWNER(w) == 0 &&
            __atomic_compare_exchange_n(&m->p2m[pfn], &w, w | (m->owner << 24), 0,
                                        __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return w;
        relax(&spins);
    }
}

/* Change type and touched bit of an entry that we hold; keep or drop the lock. */
static inline void entry_set(struct sim_map *m, uint64_t pfn, uint32_t type, int touched,
                             int unlock)
{
    uint32_t w = __atomic_load_n(&m->p2m[pfn], __ATOMIC_RELAXED), want;

    do {
        want = (w & ~(0xfu | E_TOUCHED)) | type | (touched ? E_TOUCHED : 0);
        if (unlock)
            want &= 0x00ffffffu;
    } while (!__atomic_compare_exchange_n(&m->p2m[pfn], &w, want, 0, __ATOMIC_SEQ_CST,
                                          __ATOMIC_RELAXED));
}

static inline void entry_unlock(struct sim_map *m, uint64_t pfn)
{
    __atomic_fetch_and(&m->p2m[pfn], 0x00ffffffu, __ATOMIC_SEQ_CST);
}

static inline void mark_dirty(struct sim_map *m, uint64_t pfn)
{
    if (!__atomic_load_n(&m->dom->log_dirty, __ATOMIC_SEQ_CST))
        return;
    if (__atomic_load_n(&m->dom->untracked, __ATOMIC_SEQ_CST) &&
        __atomic_load_n(&m->untracked[pfn / 64], __ATOMIC_SEQ_CST) >> (pfn % 64) & 1)
        return;
    __atomic_fetch_or(&m->dirty[pfn / 64], 1ull << (pfn % 64), __ATOMIC_SEQ_CST);
}

/* Note that a pfn has lost or got a frame.  Up to Xen 4.18 log-dirty does not record this, and does
 * not record writes to a new frame until the bitmap is cleaned, because its entry is p2m_ram_rw
 * until then (guest_physmap_add_page()). */
static inline void physmap_changed(struct sim_map *m, uint64_t pfn, int got)
{
    if (m->dom->tracks_physmap) {
        mark_dirty(m, pfn);
    } else if (got && __atomic_load_n(&m->dom->log_dirty, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_or(&m->untracked[pfn / 64], 1ull << (pfn % 64), __ATOMIC_SEQ_CST);
        __atomic_store_n(&m->dom->untracked, 1, __ATOMIC_SEQ_CST);
    }
}

/* alloc_domheap_pages() and assign_pages().  False if the domain may own no further frame. */
static inline int get_frame(struct sim_map *m)
{
    uint64_t now = __atomic_load_n(&m->dom->tot_pages, __ATOMIC_SEQ_CST);

    do {
        if (now >= __atomic_load_n(&m->dom->max_pages, __ATOMIC_SEQ_CST))
            return 0;
    } while (!__atomic_compare_exchange_n(&m->dom->tot_pages, &now, now + 1, 0, __ATOMIC_SEQ_CST,
                                          __ATOMIC_SEQ_CST));
    return 1;
}

int sim_free_frames(struct sim_map *m, uint64_t pfn, uint64_t n);

/* program.c: what the words of an access hold */
uint64_t sim_writes(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t visits);
uint32_t sim_word(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t write);
uint64_t sim_value(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t write);
uint64_t sim_image_word(const struct sim_program *p, uint64_t page, uint32_t word);
uint64_t sim_taken_word(const struct sim_program *p, uint64_t page, uint64_t taken, uint32_t word);
int sim_balloon_gives(const struct sim_program *p, uint64_t step, uint64_t *number);

#endif
