/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * References to a frame besides that of the p2m: the hypervisor's own, and those of programs.
 *
 * Sources: xen/common/grant_table.c, xenbackend/hypervisor/populate-evicted-4.17.patch.
 */
#include <errno.h>
#include "internal.h"

/* XENMEM_paging_op_list_pinned of our patch: find the pfns whose frames the hypervisor itself
 * accesses. */
size_t sim_pinned(struct sim_map *m, const uint64_t *pfns, size_t n, uint64_t *pinned)
{
    const struct sim_domain *d = m->dom;
    size_t count = 0;

    for (size_t i = 0; i < n; i++)
        for (uint32_t v = 0; v < d->nr_vcpus; v++)
            if (d->vcpu[v].registered && d->vcpu[v].vcpu_info_pfn == pfns[i]) {
                pinned[count++] = pfns[i];
                break;
            }
    return count;
}

/* XENMEM_paging_op_query_held: find the pfns to which there are references besides the guest's own
 * mappings; nominate would refuse them. */
size_t sim_held(struct sim_map *m, const uint64_t *pfns, size_t n, uint64_t *held)
{
    size_t count = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t w;

        if (pfns[i] >= m->dom->nr_pfns)
            continue;
        w = __atomic_load_n(&m->p2m[pfns[i]], __ATOMIC_SEQ_CST);
        if (is_ram(E_TYPE(w)) && (E_REFS(w) || E_TYPE_REFS(w)))
            held[count++] = pfns[i];
    }
    return count;
}

/* GNTTABOP_map_grant_ref by a back end, writable.  A page that is paged out is EAGAIN. */
int sim_map_grant(struct sim_map *m, uint64_t pfn)
{
    uint32_t w;
    int rc = 0;

    if (pfn >= m->dom->nr_pfns)
        return -EINVAL;
    w = entry_lock(m, pfn);
    if (is_ram(E_TYPE(w)))
        __atomic_fetch_add(&m->p2m[pfn], E_REF, __ATOMIC_SEQ_CST);
    else
        rc = is_paging(E_TYPE(w)) ? -EAGAIN : -EINVAL;
    if (!rc)
        __atomic_fetch_or(&m->p2m[pfn], E_TOUCHED, __ATOMIC_SEQ_CST);
    entry_unlock(m, pfn);
    return rc;
}

/* GNTTABOP_unmap_grant_ref.  Log-dirty records here what the back end has written by the mapping
 * (unmap_common()), and not when it is written. */
void sim_unmap_grant(struct sim_map *m, uint64_t pfn)
{
    mark_dirty(m, pfn);
    __atomic_fetch_sub(&m->p2m[pfn], E_REF, __ATOMIC_SEQ_CST);
}

/* For tests: put a page into a state that a real guest or host would cause.  -1 leaves a value
 * unchanged. */
int sim_set_page(struct sim_map *m, uint64_t pfn, int type, int refs, int type_count)
{
    uint32_t w, want;

    if (pfn >= m->dom->nr_pfns)
        return -EINVAL;
    entry_lock(m, pfn);
    w = __atomic_load_n(&m->p2m[pfn], __ATOMIC_RELAXED);
    do {
        want = w & 0x00ffffffu;
        if (type >= 0)
            want = (want & ~0xfu) | (type & 0xf);
        if (refs >= 0)
            want = (want & ~(0x3fu << 12)) | (refs & 0x3f) << 12;
        if (type_count >= 0)
            want = (want & ~(0x1fu << 18)) | (type_count & 0x1f) << 18;
    } while (!__atomic_compare_exchange_n(&m->p2m[pfn], &w, want, 0, __ATOMIC_SEQ_CST,
                                          __ATOMIC_RELAXED));
    return 0;
}
