/*
 * The hypercalls of the real Xen, batch by batch.
 *
 * libxenctrl has most of them.  Not the paging operations as we need them: it takes a hypercall buffer anew for
 * each page that is loaded, which costs more than the call, and it does not know populate_evicted.  Those are made
 * here with xencall, on buffers that are kept.
 *
 * Sources: xen/include/public/memory.h, hvm/params.h; tools/include/xenctrl.h, xencall.h, xenevtchn.h (Xen 4.17).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xencall.h>
#include <xenctrl.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xen/hvm/params.h>
#include <xen/memory.h>
#include "api.h"

#ifndef XENMEM_paging_op_populate_evicted
#define XENMEM_paging_op_populate_evicted 3     /* xenbackend/hypervisor/populate-evicted.patch */
#endif

#define BUFFERS 4           /* threads that load or evict at once without waiting for each other */
#define BATCH_GFNS 1024     /* of one hypercall */

/* Memory that a hypercall may read and write, locked as the kernel wants it. */
struct call_buffer {
    pthread_mutex_t lock;
    struct xen_mem_paging_op *op;       /* one page */
    uint8_t *data;                      /* BATCH_GFNS gfns, or a page's contents */
};

struct xen_host {
    xc_interface *xch;
    xencall_handle *call;
    xenforeignmemory_handle *fmem;
    struct call_buffer buffer[BUFFERS];
};

#define DATA_PAGES (BATCH_GFNS * sizeof(uint64_t) / XC_PAGE_SIZE)

void xen_host_close(struct xen_host *h)
{
    for (int i = 0; i < BUFFERS; i++) {
        if (h->buffer[i].op)
            xencall_free_buffer_pages(h->call, h->buffer[i].op, 1);
        if (h->buffer[i].data)
            xencall_free_buffer_pages(h->call, h->buffer[i].data, DATA_PAGES);
        pthread_mutex_destroy(&h->buffer[i].lock);
    }
    if (h->fmem)
        xenforeignmemory_close(h->fmem);
    if (h->call)
        xencall_close(h->call);
    if (h->xch)
        xc_interface_close(h->xch);
    free(h);
}

int xen_host_open(struct xen_host **out)
{
    struct xen_host *h = calloc(1, sizeof(*h));
    int rc = 0;

    if (!h)
        return -ENOMEM;
    for (int i = 0; i < BUFFERS; i++)
        pthread_mutex_init(&h->buffer[i].lock, NULL);
    h->xch = xc_interface_open(NULL, NULL, 0);
    h->call = xencall_open(NULL, 0);
    h->fmem = xenforeignmemory_open(NULL, 0);
    if (!h->xch || !h->call || !h->fmem)
        rc = -errno;
    for (int i = 0; !rc && i < BUFFERS; i++) {
        h->buffer[i].op = xencall_alloc_buffer_pages(h->call, 1);
        h->buffer[i].data = xencall_alloc_buffer_pages(h->call, DATA_PAGES);
        if (!h->buffer[i].op || !h->buffer[i].data)
            rc = -ENOMEM;
    }
    if (rc) {
        xen_host_close(h);
        return rc;
    }
    *out = h;
    return 0;
}

static struct call_buffer *take_buffer(struct xen_host *h)
{
    for (int i = 0; i < BUFFERS; i++)
        if (!pthread_mutex_trylock(&h->buffer[i].lock))
            return &h->buffer[i];
    pthread_mutex_lock(&h->buffer[0].lock);
    return &h->buffer[0];
}

/* ---- life ---- */
int xen_domain_info(struct xen_host *h, uint32_t domid, struct xen_info *out)
{
    xc_domaininfo_t info;
    xen_pfn_t nr_gfns;
    int found = xc_domain_getinfolist(h->xch, domid, 1, &info);

    if (found < 0)
        return -errno;
    if (!found || info.domain != domid)
        return -ESRCH;
    if (xc_domain_nr_gpfns(h->xch, domid, &nr_gfns) < 0)
        return -errno;
    *out = (struct xen_info){
        .tot_pages = info.tot_pages, .max_pages = info.max_pages, .paged_pages = info.paged_pages, .nr_gfns = nr_gfns,
        .vcpus = info.max_vcpu_id + 1, .paused = !!(info.flags & XEN_DOMINF_paused),
        .shutdown = !!(info.flags & XEN_DOMINF_shutdown),
        .shutdown_reason = info.flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask,
        .dying = !!(info.flags & XEN_DOMINF_dying), .hap = !!(info.flags & XEN_DOMINF_hap),
    };
    return 0;
}

int xen_pause(struct xen_host *h, uint32_t domid) { return xc_domain_pause(h->xch, domid) ? -errno : 0; }
int xen_unpause(struct xen_host *h, uint32_t domid) { return xc_domain_unpause(h->xch, domid) ? -errno : 0; }

/* ---- memory ---- */
int xen_map(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, void **address, int *errors)
{
    *address = xenforeignmemory_map(h->fmem, domid, PROT_READ, n, (const xen_pfn_t *)gfns, errors);
    return *address ? 0 : -errno;
}

int xen_unmap(struct xen_host *h, void *address, size_t n)
{
    return xenforeignmemory_unmap(h->fmem, address, n) ? -errno : 0;
}

int xen_set_max_pages(struct xen_host *h, uint32_t domid, uint64_t pages)
{
    return xc_domain_setmaxmem(h->xch, domid, pages * (XC_PAGE_SIZE / 1024)) ? -errno : 0;
}

int xen_populate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    for (*done = 0; *done < n;) {
        size_t batch = n - *done < BATCH_GFNS ? n - *done : BATCH_GFNS;
        int put = xc_domain_populate_physmap(h->xch, domid, batch, 0, 0, (xen_pfn_t *)gfns + *done);

        if (put < 0)
            return -errno;
        *done += put;
        if ((size_t)put < batch)
            return -ENOMEM;
    }
    return 0;
}

int xen_depopulate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    for (*done = 0; *done < n;) {
        size_t batch = n - *done < BATCH_GFNS ? n - *done : BATCH_GFNS;
        int taken = xc_domain_decrease_reservation(h->xch, domid, batch, 0, (xen_pfn_t *)gfns + *done);

        if (taken < 0)
            return -errno;
        *done += taken;
        if ((size_t)taken < batch)
            return -EINVAL;
    }
    return 0;
}

/* ---- paging ---- */
static int paging_op(struct xen_host *h, struct call_buffer *b, uint32_t domid, uint8_t op, const void *buffer, uint64_t gfn)
{
    memset(b->op, 0, sizeof(*b->op));
    b->op->op = op;
    b->op->domain = domid;
    set_xen_guest_handle_raw(b->op->buffer, buffer);
    b->op->gfn = gfn;
    return xencall2(h->call, __HYPERVISOR_memory_op, XENMEM_paging_op, (uintptr_t)b->op) < 0 ? -errno : 0;
}

int xen_probe_paging(struct xen_host *h, uint32_t domid)
{
    struct call_buffer *b = take_buffer(h);
    /* No domain has this gfn: EBUSY for its pager, ENODEV for anyone else. */
    int rc = paging_op(h, b, domid, XENMEM_paging_op_nominate, NULL, ~0ull);

    pthread_mutex_unlock(&b->lock);
    return rc == -EBUSY || rc == -ENODEV ? 0 : rc;
}

int xen_probe_populate_evicted(struct xen_host *h, uint32_t domid)
{
    struct call_buffer *b = take_buffer(h);
    int rc = paging_op(h, b, domid, XENMEM_paging_op_populate_evicted, b->data, 0);

    pthread_mutex_unlock(&b->lock);
    return rc;
}

int xen_populate_evicted(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    struct call_buffer *b = take_buffer(h);
    int rc = 0;

    for (*done = 0; !rc && *done < n;) {
        size_t batch = n - *done < BATCH_GFNS ? n - *done : BATCH_GFNS;

        memcpy(b->data, gfns + *done, batch * sizeof(*gfns));
        rc = paging_op(h, b, domid, XENMEM_paging_op_populate_evicted, b->data, batch);
        *done += batch - b->op->gfn;    /* what is left over comes back; all of it, where nothing was begun */
    }
    pthread_mutex_unlock(&b->lock);
    return rc;
}

int xen_evict_one_by_one(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    struct call_buffer *b = take_buffer(h);
    int rc = 0;

    for (*done = 0; *done < n; ++*done) {
        uint64_t gfn = gfns[*done];

        rc = paging_op(h, b, domid, XENMEM_paging_op_nominate, NULL, gfn);
        if (rc == -EBUSY) {     /* a hole, perhaps; populating what is there already does nothing */
            xen_pfn_t one = gfn;
            int put = xc_domain_populate_physmap(h->xch, domid, 1, 0, 0, &one);

            rc = put < 0 ? -errno : put ? paging_op(h, b, domid, XENMEM_paging_op_nominate, NULL, gfn) : -ENOMEM;
        }
        if (!rc)
            rc = paging_op(h, b, domid, XENMEM_paging_op_evict, NULL, gfn);
        if (rc)
            break;
    }
    pthread_mutex_unlock(&b->lock);
    return rc;
}

int xen_load(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, const uint8_t *pages, int32_t *results)
{
    struct call_buffer *b = take_buffer(h);

    if (!pages)
        memset(b->data, 0, XC_PAGE_SIZE);
    for (size_t i = 0; i < n; i++) {
        if (pages)
            memcpy(b->data, pages + i * XC_PAGE_SIZE, XC_PAGE_SIZE);
        results[i] = paging_op(h, b, domid, XENMEM_paging_op_prep, b->data, gfns[i]);
    }
    pthread_mutex_unlock(&b->lock);
    return 0;
}

/* The frame that becomes the ring, mapped; it has to be in the guest's physmap until Xen has it. */
static int map_ring_frame(struct xen_host *h, uint32_t domid, xen_pfn_t *pfn, void **page, int *populated)
{
    uint64_t value;
    int err;

    if (xc_hvm_param_get(h->xch, domid, HVM_PARAM_PAGING_RING_PFN, &value))
        return -errno;
    *pfn = value;
    if (!*pfn) {        /* a domain that is being restored: after the highest page */
        if (xc_domain_nr_gpfns(h->xch, domid, pfn) < 0)
            return -errno;
        if (xc_hvm_param_set(h->xch, domid, HVM_PARAM_PAGING_RING_PFN, *pfn))
            return -errno;
    }
    for (*populated = 0;; *populated = 1) {
        *page = xenforeignmemory_map(h->fmem, domid, PROT_READ | PROT_WRITE, 1, pfn, &err);
        if (*page && !err)
            return 0;
        if (*page)
            xenforeignmemory_unmap(h->fmem, *page, 1);
        if (*populated)
            return err ? -err : -EINVAL;
        if (xc_domain_populate_physmap_exact(h->xch, domid, 1, 0, 0, pfn))
            return -errno;
    }
}

int xen_paging_enable(struct xen_host *h, uint32_t domid, struct xen_pager *out)
{
    xenevtchn_handle *evtchn = NULL;
    xen_pfn_t pfn;
    uint32_t remote;
    void *page;
    int rc = xen_probe_paging(h, domid), populated, port;

    if (rc)
        return rc;
    rc = map_ring_frame(h, domid, &pfn, &page, &populated);
    if (rc)
        return rc;
    if (xc_mem_paging_enable(h->xch, domid, &remote)) {
        rc = -errno;
        goto unmap;
    }
    evtchn = xenevtchn_open(NULL, 0);
    port = evtchn ? xenevtchn_bind_interdomain(evtchn, domid, remote) : -1;
    if (port < 0) {
        rc = -errno;
        goto disable;
    }
    /* Xen has initialised the ring; now the guest is not to see the frame any more. */
    if (xc_domain_decrease_reservation_exact(h->xch, domid, 1, 0, &pfn)) {
        rc = -errno;
        goto disable;
    }
    *out = (struct xen_pager){ .ring_page = page, .port = port, .event_fd = xenevtchn_fd(evtchn), .evtchn = evtchn };
    return 0;

 disable:
    xc_mem_paging_disable(h->xch, domid);
    if (evtchn)
        xenevtchn_close(evtchn);
 unmap:
    xenforeignmemory_unmap(h->fmem, page, 1);
    if (populated)
        xc_domain_decrease_reservation_exact(h->xch, domid, 1, 0, &pfn);
    return rc;
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

int xen_paging_disable(struct xen_host *h, uint32_t domid, struct xen_pager *pager)
{
    int rc = xc_mem_paging_disable(h->xch, domid) ? -errno : 0;

    if (!rc) {
        xenevtchn_close(pager->evtchn);
        xenforeignmemory_unmap(h->fmem, pager->ring_page, 1);
    }
    return rc;
}
