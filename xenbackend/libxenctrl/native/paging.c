/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory paging: the ring, eviction, loading.
 *
 * The ring's frame stays in the guest's physmap, read-only for the guest (p2m_ram_ro: its writes
 * are discarded), so that it can be mapped again when its pager has died.  Xen keeps the request
 * slots, and the pager keeps its notes in the same page (xenbackend/native/vm_event.h).  Xen's end
 * of the event channel becomes unbound when the pager's process ends, and a successor binds to it
 * anew.  So a pager can be killed at any time; faults wait in the ring meanwhile.
 *
 * Sources: xen/include/public/memory.h, hvm/params.h, hvm/dm_op.h; tools/include/xenctrl.h,
 * xenevtchn.h; xen/common/vm_event.c, event_channel.c (Xen 4.17).
 */
#include "internal.h"
#include "../../native/vm_event.h"

/* ---- pages ---- */
static int evict_batch(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                       size_t *done)
{
    struct call_buffer *b = take_buffer(h);
    int rc = 0;

    for (*done = 0; !rc && *done < n;) {
        size_t batch = batch_of(n - *done);

        memcpy(b->data, gfns + *done, batch * sizeof(*gfns));
        rc = paging_op(h, b, domid, XENMEM_paging_op_populate_evicted, b->data, batch);
        /* op->gfn is the number of gfns that are left over: all, if Xen did not begin */
        *done += batch - b->op->gfn;
    }
    give_buffer(b);
    return rc;
}

static int nominate_and_evict(struct xen_host *h, struct call_buffer *b, uint32_t domid,
                              uint64_t gfn)
{
    int rc = paging_op(h, b, domid, XENMEM_paging_op_nominate, NULL, gfn);

    return rc ? rc : paging_op(h, b, domid, XENMEM_paging_op_evict, NULL, gfn);
}

/* A page cannot be nominated before it is present.  The holes of a batch get their memory in one
 * call, because testing, populating, nominating and evicting page by page takes three times as
 * long.  A page that then cannot be evicted becomes a hole again. */
static int evict_ascending(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                           size_t *done)
{
    uint8_t types[BATCH_GFNS];
    uint64_t holes[BATCH_GFNS];
    size_t nr_holes = 0, populated, evicted = 0, given_back;
    struct call_buffer *b;
    int rc = xen_page_types(h, domid, gfns, n, types), not_populated;

    *done = 0;
    if (rc)
        return rc;
    for (size_t i = 0; i < n; i++)
        if (types[i] == PAGE_HOLE)
            holes[nr_holes++] = gfns[i];
    not_populated = populate_holes(h, domid, holes, nr_holes, &populated);
    b = take_buffer(h);
    for (; *done < n && (types[*done] != PAGE_HOLE || evicted < populated); ++*done) {
        rc = nominate_and_evict(h, b, domid, gfns[*done]);
        if (rc)
            break;
        evicted += types[*done] == PAGE_HOLE;
    }
    give_buffer(b);
    xen_depopulate(h, domid, holes + evicted, populated - evicted, &given_back);
    return rc || *done ? rc : not_populated;  /* evicted pages leave memory for further ones */
}

int xen_evict_one_by_one(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                         size_t *done)
{
    int rc = 0;

    for (*done = 0; !rc && *done < n;) {
        size_t most = batch_of(n - *done), batch = 1, evicted;

        while (batch < most && gfns[*done + batch] > gfns[*done + batch - 1])
            batch++;
        rc = evict_ascending(h, domid, gfns + *done, batch, &evicted);
        *done += evicted;
    }
    return rc;
}

int xen_populate_evicted(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                         size_t *done)
{
    return (h->has_populate_evicted ? evict_batch : xen_evict_one_by_one)(h, domid, gfns, n, done);
}

int xen_load(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
             const uint8_t *pages, int32_t *results)
{
    struct call_buffer *b = take_buffer(h);
    int rc = 0;

    if (!pages)
        memset(b->data, 0, XC_PAGE_SIZE);
    for (size_t i = 0; i < n && rc != -ENODEV; i++) {
        if (pages)
            memcpy(b->data, pages + i * XC_PAGE_SIZE, XC_PAGE_SIZE);
        rc = results[i] = paging_op(h, b, domid, XENMEM_paging_op_prep, b->data, gfns[i]);
    }
    give_buffer(b);
    return rc == -ENODEV ? rc : 0;
}

/* ---- the ring ---- */
static int map_ring(struct xen_host *h, uint32_t domid, uint64_t gfn, void **page)
{
    xen_pfn_t frame = gfn;
    int error;

    *page = xenforeignmemory_map(h->fmem, domid, PROT_READ | PROT_WRITE, 1, &frame, &error);
    if (*page && error) {
        xenforeignmemory_unmap(h->fmem, *page, 1);
        *page = NULL;
        errno = abs(error);
    }
    return *page ? 0 : -errno;
}

static int bind_channel(uint32_t domid, struct xen_pager *pager)
{
    xenevtchn_handle *evtchn = xenevtchn_open(NULL, 0);
    int port = evtchn ? xenevtchn_bind_interdomain(evtchn, domid, pager->remote_port) : -1;

    if (port < 0) {
        int rc = -errno;

        if (evtchn)
            xenevtchn_close(evtchn);
        return rc;
    }
    pager->evtchn = evtchn;
    pager->port = port;
    pager->event_fd = xenevtchn_fd(evtchn);
    return 0;
}

int xen_paging_enable(struct xen_host *h, uint32_t domid, uint64_t spare_gfn, struct xen_pager *out)
{
    struct xen_pager pager = { 0 };
    xen_pfn_t frame;
    uint8_t type;
    int rc, populated = 0;

    if (xc_hvm_param_get(h->xch, domid, HVM_PARAM_PAGING_RING_PFN, &pager.ring_gfn))
        return -errno;
    if (!pager.ring_gfn) {
        pager.ring_gfn = spare_gfn;
        if (xc_hvm_param_set(h->xch, domid, HVM_PARAM_PAGING_RING_PFN, spare_gfn))
            return -errno;
    }
    frame = pager.ring_gfn;
    rc = xen_page_types(h, domid, &pager.ring_gfn, 1, &type);
    if (rc)
        return rc;
    if (type == PAGE_HOLE) {
        if (xc_domain_populate_physmap_exact(h->xch, domid, 1, 0, 0, &frame))
            return -errno;
        populated = 1;
    }
    rc = map_ring(h, domid, pager.ring_gfn, &pager.ring_page);
    if (rc)
        goto depopulate;
    if (xc_mem_paging_enable(h->xch, domid, &pager.remote_port)) {
        rc = -errno;
        goto unmap;
    }
    /* From now on the guest must not write to the ring. */
    if (xendevicemodel_set_mem_type(h->dmod, domid, HVMMEM_ram_ro, pager.ring_gfn, 1)) {
        rc = -errno;
        goto disable;
    }
    rc = bind_channel(domid, &pager);
    if (rc)
        goto disable;
    *out = pager;
    return 0;

 disable:
    xc_mem_paging_disable(h->xch, domid);
 unmap:
    xenforeignmemory_unmap(h->fmem, pager.ring_page, 1);
 depopulate:
    if (populated)
        xc_domain_decrease_reservation_exact(h->xch, domid, 1, 0, &frame);
    return rc;
}

int xen_has_ring(struct xen_host *h, uint32_t domid)
{
    struct call_buffer *b = take_buffer(h);
    /* no gfn has this number */
    int rc = paging_op(h, b, domid, XENMEM_paging_op_nominate, NULL, ~0ull);

    give_buffer(b);
    return rc == -EBUSY ? 1 : rc == -ENODEV || rc == -ENOSYS ? 0 : rc;
}

int xen_paging_attach(struct xen_host *h, uint32_t domid, struct xen_pager *out)
{
    struct xen_pager pager = { 0 };
    int rc = xen_has_ring(h, domid);

    if (rc != 1)
        return rc ? rc : -ENODEV;
    if (xc_hvm_param_get(h->xch, domid, HVM_PARAM_PAGING_RING_PFN, &pager.ring_gfn))
        return -errno;
    rc = map_ring(h, domid, pager.ring_gfn, &pager.ring_page);
    if (rc)
        return rc == -EINVAL ? -ENODEV : rc;  /* other pagers remove their ring's frame */
    pager.remote_port = pager_notes(pager.ring_page)->channel;
    rc = pager_notes(pager.ring_page)->magic == PAGER_NOTES_MAGIC ? bind_channel(domid, &pager)
         : -ENODEV;
    if (rc) {
        xenforeignmemory_unmap(h->fmem, pager.ring_page, 1);
        return rc == -EINVAL ? -EBUSY : rc;     /* the channel is bound, so its pager lives */
    }
    *out = pager;
    return 0;
}

int xen_event_take(struct xen_pager *pager)
{
    int port = xenevtchn_pending(pager->evtchn);

    return port < 0 || xenevtchn_unmask(pager->evtchn, port) ? -errno : 0;
}

int xen_event_notify(struct xen_pager *pager)
{
    return xenevtchn_notify(pager->evtchn, pager->port) ? -errno : 0;
}

void xen_pager_close(struct xen_host *h, struct xen_pager *pager)
{
    if (!pager->ring_page)
        return;
    xenevtchn_close(pager->evtchn);
    xenforeignmemory_unmap(h->fmem, pager->ring_page, 1);
    pager->ring_page = NULL;
}

int xen_paging_disable(struct xen_host *h, uint32_t domid, struct xen_pager *pager)
{
    xen_pfn_t frame = pager->ring_gfn;

    if (xc_mem_paging_disable(h->xch, domid))
        return -errno;
    xen_pager_close(h, pager);
    /* The guest has no use for the frame; the next pager populates it again. */
    xc_domain_decrease_reservation_exact(h->xch, domid, 1, 0, &frame);
    return 0;
}
