/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's balloon driver: vCPU 0 gives pages away and takes them back, one in each step.
 */
#include "host.h"

/* The guest reads a page that its balloon gives away: the page must hold what was written there. */
static void check_page(struct host_vcpu *v, uint64_t page, uint64_t number)
{
    struct sim_domain *d = v->h->m->dom;
    uint64_t pfn = sim_pfn(&d->program, page);
    uint64_t taken = sim_balloon_taken(&d->program, d->balloon_steps, number);
    const uint64_t *words = (const uint64_t *)(v->h->m->memory + pfn * PAGE_BYTES);
    int wrong = 0;

    if (!taken && !d->program.generated)
        return;
    for (uint32_t w = 0; w < PAGE_BYTES / 8; w++)
        wrong |= words[w] != (taken ? sim_taken_word(&d->program, page, taken, w)
                              : sim_image_word(&d->program, page, w));
    if (wrong && !d->vcpu[v->id].errors++)
        d->vcpu[v->id].first_error_pfn = pfn;
}

/* The guest's balloon driver: decrease_reservation of a page.  Xen 4.17.5 refuses a page that is
 * paged out (EILSEQ, p2m_remove_entry()), and Linux scrubs pages that it gives away, which first
 * loads them.  With ``drops`` the interface is followed: the page is dropped, and the pager is
 * informed.  Returns 0 if it has to be tried again. */
static int give_away(struct host_vcpu *v, uint64_t page, uint64_t number)
{
    struct sim_host_domain *h = v->h;
    struct sim_domain *d = h->m->dom;
    uint64_t pfn = sim_pfn(&d->program, page);
    uint32_t w = entry_lock(h->m, pfn);

    if (!d->drops && is_paging(E_TYPE(w))) {
        entry_unlock(h->m, pfn);
        page_fault(v, pfn);
        return 0;
    }
    if (is_ram(E_TYPE(w)) || E_TYPE(w) == P2M_RAM_PAGING_OUT) {
        check_page(v, page, number);
        entry_set(h->m, pfn, P2M_HOLE, 0, 0);
        sim_free_frames(h->m, pfn, 1);
        __atomic_fetch_sub(&d->tot_pages, 1, __ATOMIC_SEQ_CST);
        physmap_changed(h->m, pfn, 0);
        entry_unlock(h->m, pfn);
    } else if (is_paging(E_TYPE(w))) {
        entry_set(h->m, pfn, P2M_HOLE, 0, 1);
        __atomic_fetch_sub(&d->paged_pages, 1, __ATOMIC_SEQ_CST);
        /* p2m_mem_paging_drop_page() does not wait for a slot.  If the ring is full, the pager gets
         * no request, and notices the drop only when it loads the page. */
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

/* The guest's balloon driver: populate_physmap.  Xen replaces what is at the pfn, and a present
 * frame is lost to the domain.  Returns 0 if the domain may own no further frame; as Linux does,
 * the guest tries again later. */
static int take_back(struct host_vcpu *v, uint64_t page, uint64_t number)
{
    struct sim_map *m = v->h->m;
    struct sim_domain *d = m->dom;
    uint64_t pfn = sim_pfn(&d->program, page);
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
        __atomic_store_n(&words[i], sim_taken_word(&d->program, page, taken, i), __ATOMIC_RELAXED);
    mark_dirty(m, pfn);
    entry_unlock(m, pfn);
    return 1;
}

int move_balloon(struct host_vcpu *v)
{
    struct sim_domain *d = v->h->m->dom;
    uint64_t number, page;
    int gives = sim_balloon_gives(&d->program, d->balloon_steps, &number);

    page = sim_balloon_page(&d->program, d->nr_pfns, number);
    if (!(gives ? give_away(v, page, number) : take_back(v, page, number)))
        return !gives;
    __atomic_store_n(&d->balloon_steps, d->balloon_steps + 1, __ATOMIC_SEQ_CST);
    return 1;
}
