/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The simulated hypervisor's page operations.
 *
 * A hypercall runs here in the caller's process, on the shared p2m.  As with a real hypercall, no
 * other process has to wake up for it.  A real hypercall outlives its caller, and a simulated one
 * does not.  So every step that must not be half done is made under the entry's lock, which names
 * its holder.  When a process ends, the host undoes what it held (sim_repair).
 *
 * A frame's place in the memory file is its pfn, so the kernel allocates and frees the frames.  A
 * hole in the file reads as zeros, and to free a frame punches a hole.
 *
 * Errors follow Xen 4.17: xen/arch/x86/mm/mem_paging.c, mem_access.c and xen/common/memory.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "internal.h"

static uint64_t round_page(uint64_t bytes)
{
    return (bytes + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);
}

uint64_t sim_control_bytes(uint64_t nr_pfns)
{
    return SIM_HEADER_BYTES + round_page(nr_pfns * 4) + 2 * round_page((nr_pfns + 63) / 64 * 8);
}

int sim_attach(struct sim_map *m, int control_fd, int memory_fd, uint32_t owner)
{
    struct stat control, memory;
    uint8_t *base;
    uint64_t nr_pfns;

    _Static_assert(sizeof(struct sim_domain) <= SIM_HEADER_BYTES, "header");
    if (fstat(control_fd, &control) || fstat(memory_fd, &memory))
        return -errno;
    nr_pfns = memory.st_size / PAGE_BYTES;
    if ((uint64_t)control.st_size != sim_control_bytes(nr_pfns))
        return -EINVAL;
    base = mmap(NULL, control.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                control_fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    m->memory = mmap(NULL, memory.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                     memory_fd, 0);
    if (m->memory == MAP_FAILED) {
        munmap(base, control.st_size);
        return -errno;
    }
    m->dom = (struct sim_domain *)base;
    m->p2m = (uint32_t *)(base + SIM_HEADER_BYTES);
    m->dirty = (uint64_t *)(base + SIM_HEADER_BYTES + round_page(nr_pfns * 4));
    m->untracked = (uint64_t *)((uint8_t *)m->dirty + round_page((nr_pfns + 63) / 64 * 8));
    m->memory_fd = memory_fd;
    m->owner = owner;
    m->control_bytes = control.st_size;
    return 0;
}

void sim_detach(struct sim_map *m)
{
    if (!m->dom)
        return;
    munmap(m->memory, m->dom->nr_pfns * PAGE_BYTES);
    munmap(m->dom, m->control_bytes);
    m->dom = NULL;
}

int sim_free_frames(struct sim_map *m, uint64_t pfn, uint64_t n)
{
    return fallocate(m->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     pfn * PAGE_BYTES, n * PAGE_BYTES) ? -errno : 0;
}

/* Undo what a dead process held: a page that it was loading or freeing is empty again. */
void sim_repair(struct sim_map *m, uint32_t dead_owner)
{
    for (uint64_t pfn = 0; pfn < m->dom->nr_pfns; pfn++) {
        uint32_t w = __atomic_load_n(&m->p2m[pfn], __ATOMIC_SEQ_CST);

        if (E_OWNER(w) != dead_owner)
            continue;
        if (!is_ram(E_TYPE(w)) && E_TYPE(w) != P2M_RAM_PAGING_OUT)
            sim_free_frames(m, pfn, 1);
        entry_unlock(m, pfn);
    }
}

int sim_page_types(struct sim_map *m, const uint64_t *pfns, size_t n, uint8_t *types)
{
    for (size_t i = 0; i < n; i++)
        types[i] = pfns[i] < m->dom->nr_pfns ?
            E_TYPE(__atomic_load_n(&m->p2m[pfns[i]], __ATOMIC_SEQ_CST)) : P2M_HOLE;
    return 0;
}

static int page_is_zero(const uint8_t *page)
{
    const uint64_t *w = (const uint64_t *)page;

    for (unsigned i = 0; i < PAGE_BYTES / 8; i += 8)
        if (w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7])
            return 0;
    return 1;
}

static uint8_t page_status(struct sim_map *m, uint64_t pfn)
{
    uint32_t w;

    if (pfn >= m->dom->nr_pfns)
        return PAGE_HOLE;
    w = __atomic_load_n(&m->p2m[pfn], __ATOMIC_SEQ_CST);
    if (is_ram(E_TYPE(w)) || E_TYPE(w) == P2M_RAM_PAGING_OUT)
        return w & E_TOUCHED && !page_is_zero(m->memory + pfn * PAGE_BYTES) ? PAGE_DATA : PAGE_ZERO;
    if (is_paging(E_TYPE(w)))
        return PAGE_PAGED;
    if (E_TYPE(w) == P2M_BROKEN)
        return PAGE_BROKEN;
    return PAGE_HOLE;       /* also for mmio, which cannot be copied */
}

/* Find the status of each page, and the runs of pages with data.  Returns the number of runs. */
size_t sim_look(struct sim_map *m, const uint64_t *pfns, size_t n, uint8_t *status,
                struct sim_run *runs)
{
    size_t count = 0;

    for (size_t i = 0; i < n; i++) {
        status[i] = page_status(m, pfns[i]);
        if (status[i] != PAGE_DATA)
            continue;
        if (!count || pfns[i] != runs[count - 1].first + runs[count - 1].pages)
            runs[count++] = (struct sim_run){ .first = pfns[i] };
        runs[count - 1].pages++;
    }
    return count;
}

/* Return the status of one page, as sim_look() does, and its address in *page. */
int sim_look_at(struct sim_map *m, uint64_t pfn, const void **page)
{
    *page = m->memory + pfn * PAGE_BYTES;
    return page_status(m, pfn);
}

#define RUN_PAGES 64       /* neighbours that are locked and written together */

/* Fill frames that we hold.  Several frames are written through the file and not through the
 * mapping.  The kernel then need not zero a new page that is written as a whole, which saves a
 * third of its time.  A single page, for which a vCPU waits, is written through the mapping,
 * because writers of a file wait for each other. */
static int fill_frames(struct sim_map *m, uint64_t pfn, uint64_t n, const uint8_t *pages)
{
    size_t left = n * PAGE_BYTES;
    off_t at = pfn * PAGE_BYTES;

    if (n == 1) {
        memcpy(m->memory + at, pages, left);
        return 0;
    }
    while (left) {
        ssize_t put = pwrite(m->memory_fd, pages, left, at);

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put ? -errno : -EIO;
        pages += put;
        at += put;
        left -= put;
    }
    return 0;
}

/* Write through a foreign mapping, to present pages only.  pages == NULL writes zeros. */
int sim_write(struct sim_map *m, const uint64_t *pfns, size_t n, const uint8_t *pages, size_t *done)
{
    *done = 0;
    while (*done < n) {
        uint64_t first = pfns[*done], run = 0;
        int rc = 0;

        for (; run < RUN_PAGES && *done + run < n && pfns[*done + run] == first + run; run++) {
            uint32_t w;

            if (first + run >= m->dom->nr_pfns) {
                rc = -EINVAL;
                break;
            }
            w = entry_lock(m, first + run);
            if (!is_ram(E_TYPE(w))) {
                entry_unlock(m, first + run);
                rc = E_TYPE(w) == P2M_RAM_PAGED ? -ENOENT : -EINVAL;
                break;
            }
            if (pages)
                __atomic_fetch_or(&m->p2m[first + run], E_TOUCHED, __ATOMIC_SEQ_CST);
            else if (w & E_TOUCHED)
                memset(m->memory + (first + run) * PAGE_BYTES, 0, PAGE_BYTES);
        }
        if (pages && run) {
            int filled = fill_frames(m, first, run, pages + *done * PAGE_BYTES);

            rc = filled ? filled : rc;
        }
        for (uint64_t i = 0; i < run; i++) {
            mark_dirty(m, first + i);
            entry_unlock(m, first + i);
        }
        *done += run;
        if (rc)
            return rc;
    }
    return 0;
}

/* XENMEM_populate_physmap: over a hole or a paged-out gfn. */
int sim_populate(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done)
{
    for (*done = 0; *done < n; (*done)++) {
        uint64_t pfn = pfns[*done];
        uint32_t w;

        if (pfn >= m->dom->nr_pfns)
            return -EINVAL;
        w = entry_lock(m, pfn);
        if (E_TYPE(w) != P2M_HOLE && E_TYPE(w) != P2M_RAM_PAGED) {
            entry_unlock(m, pfn);
            return -EINVAL;
        }
        if (!get_frame(m)) {
            entry_unlock(m, pfn);
            return -ENOMEM;
        }
        if (E_TYPE(w) == P2M_RAM_PAGED)
            __atomic_fetch_sub(&m->dom->paged_pages, 1, __ATOMIC_SEQ_CST);
        physmap_changed(m, pfn, 1);
        entry_set(m, pfn, P2M_RAM_RW, 0, 1);
    }
    return 0;
}

static void wait_for_accesses(struct sim_map *m, uint64_t pfn)
{
    unsigned spins = 0;

    while (E_ACCESSES(__atomic_load_n(&m->p2m[pfn], __ATOMIC_SEQ_CST)))
        relax(&spins);
}

/* XENMEM_decrease_reservation */
int sim_depopulate(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done)
{
    for (*done = 0; *done < n; (*done)++) {
        uint64_t pfn = pfns[*done];
        uint32_t w;

        if (pfn >= m->dom->nr_pfns)
            return -EINVAL;
        w = entry_lock(m, pfn);
        if (!is_ram(E_TYPE(w))) {
            entry_unlock(m, pfn);
            return -EINVAL;
        }
        wait_for_accesses(m, pfn);
        entry_set(m, pfn, P2M_HOLE, 0, 0);
        sim_free_frames(m, pfn, 1);
        __atomic_fetch_sub(&m->dom->tot_pages, 1, __ATOMIC_SEQ_CST);
        physmap_changed(m, pfn, 0);
        entry_unlock(m, pfn);
    }
    return 0;
}

static void finish_evictions(struct sim_map *m, uint64_t first, uint64_t n)
{
    if (!n)
        return;
    sim_free_frames(m, first, n);
    for (uint64_t pfn = first; pfn < first + n; pfn++)
        entry_unlock(m, pfn);
}

/* The batched operation of our patch: holes and populated pages become paged out.  Stops with EBUSY
 * at the first pfn that cannot be evicted, when all pfns before it are done. */
int sim_populate_evicted(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done)
{
    uint64_t run = 0, run_first = 0;    /* populated neighbours, freed with one call */
    int rc = 0;

    *done = 0;
    if (!__atomic_load_n(&m->dom->paging, __ATOMIC_SEQ_CST))
        return -ENODEV;
    for (; *done < n; (*done)++) {
        uint64_t pfn = pfns[*done];
        uint32_t w;

        if (run && (pfn != run_first + run || run == 512)) {
            finish_evictions(m, run_first, run);
            run = 0;
        }
        if (pfn >= m->dom->nr_pfns) {
            rc = -EINVAL;
            break;
        }
        w = entry_lock(m, pfn);
        if (E_TYPE(w) == P2M_HOLE) {
            entry_set(m, pfn, P2M_RAM_PAGED, 0, 1);
        } else if (is_ram(E_TYPE(w)) && !E_REFS(w) && !E_TYPE_REFS(w)) {
            wait_for_accesses(m, pfn);
            entry_set(m, pfn, P2M_RAM_PAGED, 0, 0);
            __atomic_fetch_sub(&m->dom->tot_pages, 1, __ATOMIC_SEQ_CST);
            if (!run)
                run_first = pfn;
            run++;
        } else {
            entry_unlock(m, pfn);
            rc = -EBUSY;
            break;
        }
        __atomic_fetch_add(&m->dom->paged_pages, 1, __ATOMIC_SEQ_CST);
    }
    finish_evictions(m, run_first, run);
    return rc;
}

/* XENMEM_paging_op_nominate: a pageable page becomes paging_out, and is still present. */
int sim_nominate(struct sim_map *m, uint64_t pfn)
{
    uint32_t w;

    if (!__atomic_load_n(&m->dom->paging, __ATOMIC_SEQ_CST))
        return -ENODEV;
    if (pfn >= m->dom->nr_pfns)
        return -EINVAL;
    w = entry_lock(m, pfn);
    if (!is_ram(E_TYPE(w)) || E_REFS(w) || E_TYPE_REFS(w)) {
        entry_unlock(m, pfn);
        return -EBUSY;
    }
    wait_for_accesses(m, pfn);
    entry_set(m, pfn, P2M_RAM_PAGING_OUT, !!(w & E_TOUCHED), 1);
    return 0;
}

/* XENMEM_paging_op_evict: evicts a nominated page to which there are no new references. */
int sim_evict(struct sim_map *m, uint64_t pfn)
{
    uint32_t w;

    if (!__atomic_load_n(&m->dom->paging, __ATOMIC_SEQ_CST))
        return -ENODEV;
    if (pfn >= m->dom->nr_pfns)
        return -EINVAL;
    w = entry_lock(m, pfn);
    if (E_TYPE(w) != P2M_RAM_PAGING_OUT || E_REFS(w) || E_TYPE_REFS(w)) {
        entry_unlock(m, pfn);
        return -EBUSY;
    }
    entry_set(m, pfn, P2M_RAM_PAGED, 0, 0);
    sim_free_frames(m, pfn, 1);
    __atomic_fetch_sub(&m->dom->tot_pages, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&m->dom->paged_pages, 1, __ATOMIC_SEQ_CST);
    entry_unlock(m, pfn);
    return 0;
}

/* XENMEM_paging_op_prep with a buffer.  The guest can access the page when this returns. results[i]
 * is 0, or -ENOENT for a gfn that is not being paged (present, a hole, or beyond the largest
 * possible gfn).  pages == NULL loads zeros.  Returns the number of loaded pages. */
long sim_load(struct sim_map *m, const uint64_t *pfns, size_t n, const uint8_t *pages,
              int32_t *results)
{
    long loaded = 0;
    size_t i = 0;

    if (!__atomic_load_n(&m->dom->paging, __ATOMIC_SEQ_CST))
        return -ENODEV;
    while (i < n) {
        uint64_t first = pfns[i], run = 0;
        int rc = 0, missed = -ENOENT;

        for (; run < RUN_PAGES && i + run < n && pfns[i + run] == first + run; run++) {
            uint32_t w;

            if (first + run >= m->dom->nr_pfns)
                break;
            w = entry_lock(m, first + run);
            if (E_TYPE(w) != P2M_RAM_PAGED && E_TYPE(w) != P2M_RAM_PAGING_IN) {
                entry_unlock(m, first + run);
                break;
            }
            if (__atomic_load_n(&m->dom->tot_pages, __ATOMIC_SEQ_CST) + run >=
                __atomic_load_n(&m->dom->max_pages, __ATOMIC_SEQ_CST)) {
                entry_unlock(m, first + run);
                missed = -ENOMEM;
                break;
            }
        }
        if (!run) {
            results[i++] = missed;
            continue;
        }
        if (pages)
            rc = fill_frames(m, first, run, pages + i * PAGE_BYTES);
        for (uint64_t k = 0; k < run; k++) {
            results[i + k] = rc;
            if (rc) {
                entry_unlock(m, first + k);
                continue;
            }
            entry_set(m, first + k, P2M_RAM_RW, pages != NULL, 1);
            /* After the fill, so that a client that is killed in the middle of a load does not
             * leave a frame counted. */
            __atomic_fetch_add(&m->dom->tot_pages, 1, __ATOMIC_SEQ_CST);
            loaded++;
        }
        i += run;
    }
    __atomic_fetch_sub(&m->dom->paged_pages, loaded, __ATOMIC_SEQ_CST);
    return loaded;
}

/* Load one page, as sim_load() does.  Returns 0 or -errno. */
int sim_load_at(struct sim_map *m, uint64_t pfn, const void *page)
{
    int32_t result = 0;
    long rc = sim_load(m, &pfn, 1, page, &result);

    return rc < 0 ? rc : result;
}

/* XEN_DOMCTL_SHADOW_OP_PEEK and _CLEAN; returns the number of dirty pages. */
uint64_t sim_log_dirty(struct sim_map *m, uint64_t *bitmap, int clean)
{
    uint64_t dirty = 0;

    for (uint64_t i = 0; i < (m->dom->nr_pfns + 63) / 64; i++) {
        bitmap[i] = __atomic_load_n(&m->dirty[i], __ATOMIC_SEQ_CST);
        if (!bitmap[i])
            continue;
        if (clean)
            bitmap[i] = __atomic_exchange_n(&m->dirty[i], 0, __ATOMIC_SEQ_CST);
        dirty += __builtin_popcountll(bitmap[i]);
    }
    if (clean && __atomic_exchange_n(&m->dom->untracked, 0, __ATOMIC_SEQ_CST))
        for (uint64_t i = 0; i < (m->dom->nr_pfns + 63) / 64; i++)
            __atomic_store_n(&m->untracked[i], 0, __ATOMIC_SEQ_CST);
    return dirty;
}
