/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A domain's memory: its state, mapped, populated, written, and which of it is dirty.
 *
 * Sources: tools/include/xenctrl.h, xenforeignmemory.h; xen/include/public/domctl.h
 * (getpageframeinfo3, shadow_op), memory.h (Xen 4.17).
 */
#include "internal.h"

/* libxenctrl exports this function for its companions, and declares it in a private header. */
int xc_get_pfn_type_batch(xc_interface *xch, uint32_t dom, unsigned int num, xen_pfn_t *arr);

/* Find the paged-out gfns among those without memory.  To load a paged-out gfn without a page fails
 * with EINVAL and changes nothing. */
static int tell_paged_from_hole(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                                uint8_t *types)
{
    struct call_buffer *b;
    struct xen_info info;
    int rc;

    if (!memchr(types, PAGE_HOLE, n))
        return 0;
    rc = xen_domain_info(h, domid, &info);
    if (rc || !info.paged_pages)
        return rc;
    b = take_buffer(h);
    for (size_t i = 0; i < n; i++)
        if (types[i] == PAGE_HOLE &&
            paging_op(h, b, domid, XENMEM_paging_op_prep, NULL, gfns[i]) == -EINVAL)
            types[i] = PAGE_PAGED;
    give_buffer(b);
    return 0;
}

int xen_page_types(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                   uint8_t *types)
{
    xen_pfn_t frames[BATCH_GFNS];

    for (size_t done = 0; done < n; done += BATCH_GFNS) {
        size_t batch = batch_of(n - done);

        memcpy(frames, gfns + done, batch * sizeof(*gfns));
        if (xc_get_pfn_type_batch(h->xch, domid, batch, frames))
            return -errno;
        for (size_t i = 0; i < batch; i++)
            switch (frames[i] & XEN_DOMCTL_PFINFO_LTAB_MASK) {
            case XEN_DOMCTL_PFINFO_XTAB:
                types[done + i] = PAGE_HOLE;
                break;
            case XEN_DOMCTL_PFINFO_BROKEN:
                types[done + i] = PAGE_BROKEN;
                break;
            default:
                types[done + i] = PAGE_DATA;
            }
    }
    return tell_paged_from_hole(h, domid, gfns, n, types);
}

static int page_is_zero(const uint8_t *page)
{
    const uint64_t *w = (const uint64_t *)page;

    for (unsigned i = 0; i < XC_PAGE_SIZE / 8; i += 8)
        if (w[i] | w[i + 1] | w[i + 2] | w[i + 3] | w[i + 4] | w[i + 5] | w[i + 6] | w[i + 7])
            return 0;
    return 1;
}

int xen_map(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint8_t *status,
            const void **pages, struct xen_view *view)
{
    xen_pfn_t *frames = calloc(n + 1, sizeof(*frames));
    int *errors = calloc(n + 1, sizeof(*errors));
    size_t mapped = 0, at = 0;
    int rc = -ENOMEM;

    *view = (struct xen_view){ 0 };
    if (!frames || !errors)
        goto out;
    rc = xen_page_types(h, domid, gfns, n, status);
    if (rc)
        goto out;
    for (size_t i = 0; i < n; i++)
        if (status[i] == PAGE_DATA)
            frames[mapped++] = gfns[i];
    if (!mapped)
        goto out;
    /* If a frame has been paged out since the types were read, the library waits for it. */
    view->address = xenforeignmemory_map(h->fmem, domid, PROT_READ, mapped, frames, errors);
    if (!view->address) {
        rc = -errno;
        goto out;
    }
    view->pages = mapped;
    for (size_t i = 0; i < n; i++)
        if (status[i] == PAGE_DATA) {
            pages[i] = (const uint8_t *)view->address + at * XC_PAGE_SIZE;
            if (errors[at])
                status[i] = errors[at] == EINVAL || errors[at] == -EINVAL ? PAGE_HOLE : PAGE_BROKEN;
            at++;
        }
 out:
    free(frames);
    free(errors);
    return rc;
}

size_t xen_look(const void *const *pages, size_t n, uint8_t *status, struct xen_run *runs)
{
    size_t count = 0;
    const void *end = NULL;     /* the end of the last run */

    for (size_t i = 0; i < n; i++) {
        if (status[i] != PAGE_DATA)
            continue;
        if (page_is_zero(pages[i])) {
            status[i] = PAGE_ZERO;
            continue;
        }
        if (count && pages[i] == end)
            runs[count - 1].pages++;
        else
            runs[count++] = (struct xen_run){ .address = pages[i], .pages = 1 };
        end = (const uint8_t *)pages[i] + XC_PAGE_SIZE;
    }
    return count;
}

int xen_unmap(struct xen_host *h, struct xen_view *view)
{
    int rc = 0;

    if (view->pages && xenforeignmemory_unmap(h->fmem, view->address, view->pages))
        rc = -errno;

    *view = (struct xen_view){ 0 };
    return rc;
}

int xen_set_max_pages(struct xen_host *h, uint32_t domid, uint64_t pages)
{
    return xc_domain_setmaxmem(h->xch, domid, pages * (XC_PAGE_SIZE / 1024)) ? -errno : 0;
}

int xen_claim(struct xen_host *h, uint32_t domid, uint64_t pages)
{
    struct xen_info info;
    int rc = xen_domain_info(h, domid, &info);

    if (rc)
        return rc;
    /* A domain has one claim, so the old one is removed first (domain_set_outstanding_pages() in
     * xen/common/page_alloc.c). */
    if (xc_domain_claim_pages(h->xch, domid, 0))
        return -errno;
    if (pages > info.max_pages)
        pages = info.max_pages;
    return pages > info.tot_pages && xc_domain_claim_pages(h->xch, domid, pages) ? -errno : 0;
}

/* Returns why Xen did not populate a gfn, because Xen itself returns only how many it did. */
static int why_not_populated(struct xen_host *h, uint32_t domid, uint64_t gfn)
{
    struct xen_info info;
    int rc = xen_domain_info(h, domid, &info);

    if (rc)
        return rc;
    return info.gpaddr_bits && gfn >> (info.gpaddr_bits - XC_PAGE_SHIFT) ? -EINVAL : -ENOMEM;
}

/* Xen would replace a present frame by a second one; the first then still belongs to the domain,
 * but has no gfn.  So a batch ends before a gfn that has memory, and before a repeated gfn. */
static size_t holes_ahead(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                          int *rc)
{
    uint8_t types[BATCH_GFNS];

    *rc = xen_page_types(h, domid, gfns, n, types);
    for (size_t i = 0; !*rc && i < n; i++) {
        if (types[i] == PAGE_DATA || types[i] == PAGE_BROKEN)
            return i;
        if (i && gfns[i] <= gfns[i - 1])    /* not ascending: the next batch begins here */
            return i;
    }
    return *rc ? 0 : n;
}

int populate_holes(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    int put = n ? xc_domain_populate_physmap(h->xch, domid, n, 0, 0, (xen_pfn_t *)gfns) : 0;

    *done = put < 0 ? 0 : put;
    return put < 0 ? -errno : *done < n ? why_not_populated(h, domid, gfns[*done]) : 0;
}

int xen_populate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    int rc = 0;

    for (*done = 0; !rc && *done < n;) {
        size_t put, batch = holes_ahead(h, domid, gfns + *done, batch_of(n - *done), &rc);

        if (rc)
            return rc;
        if (!batch)
            return -EINVAL;
        rc = populate_holes(h, domid, gfns + *done, batch, &put);
        *done += put;
    }
    return rc;
}

int xen_depopulate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done)
{
    for (*done = 0; *done < n;) {
        size_t batch = batch_of(n - *done);
        int taken = xc_domain_decrease_reservation(h->xch, domid, batch, 0,
                                                   (xen_pfn_t *)gfns + *done);

        if (taken < 0)
            return -errno;
        *done += taken;
        if ((size_t)taken < batch)
            return -EINVAL;
    }
    return 0;
}

int xen_write(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
              const uint8_t *pages, size_t *done)
{
    uint8_t types[BATCH_GFNS];
    int errors[BATCH_GFNS], rc = 0;

    for (*done = 0; !rc && *done < n;) {
        size_t batch = batch_of(n - *done), there = 0, good = 0;
        uint8_t *to;

        /* To map a paged-out frame waits for its pager, which may be this process. */
        rc = xen_page_types(h, domid, gfns + *done, batch, types);
        if (rc)
            return rc;
        /* analyser: types is not written only if libxenctrl fails, and errno is not 0 then */
        while (there < batch && types[there] == PAGE_DATA)
            there++;
        if (there < batch)
            rc = types[there] == PAGE_PAGED ? -ENOENT : -EINVAL;
        if (!there)
            return rc;
        to = xenforeignmemory_map(h->fmem, domid, PROT_READ | PROT_WRITE, there,
                                  (xen_pfn_t *)gfns + *done, errors);
        if (!to)
            return -errno;
        for (; good < there && !errors[good]; good++) {
            if (pages)
                memcpy(to + good * XC_PAGE_SIZE, pages + (*done + good) * XC_PAGE_SIZE,
                       XC_PAGE_SIZE);
            else
                memset(to + good * XC_PAGE_SIZE, 0, XC_PAGE_SIZE);
        }
        if (good < there)
            rc = -EINVAL;
        xenforeignmemory_unmap(h->fmem, to, there);
        *done += good;
    }
    return rc;
}

/* ---- log-dirty ---- */
int xen_log_dirty_disable(struct xen_host *h, uint32_t domid)
{
    return xc_shadow_control(h->xch, domid, XEN_DOMCTL_SHADOW_OP_OFF, NULL, 0) < 0 ? -errno : 0;
}

int xen_log_dirty_enable(struct xen_host *h, uint32_t domid)
{
    if (xc_shadow_control(h->xch, domid, XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY, NULL, 0) >= 0)
        return 0;
    /* paging_log_dirty_enable() returns EINVAL for a domain whose log-dirty is on.  Xen does not
     * record who enabled it. */
    return errno == EINVAL ? -EBUSY : -errno;
}

/* Xen has no call for this, but refuses to switch log-dirty on a second time. */
int xen_log_dirty_is_on(struct xen_host *h, uint32_t domid)
{
    int rc = xen_log_dirty_enable(h, domid);

    return rc ? rc == -EBUSY ? 1 : rc : xen_log_dirty_disable(h, domid);
}

int xen_log_dirty(struct xen_host *h, uint32_t domid, int clean, uint8_t *bitmap, uint64_t nr_gfns)
{
    DECLARE_HYPERCALL_BUFFER(uint8_t, buffer);
    size_t bytes = (nr_gfns + 63) / 64 * 8, pages = (bytes + XC_PAGE_SIZE - 1) / XC_PAGE_SIZE;
    int rc = 0;

    buffer = xc_hypercall_buffer_alloc_pages(h->xch, buffer, pages);
    if (!buffer)
        return -ENOMEM;
    memset(buffer, 0, bytes);
    /* FINAL: pages that the hypervisor has mapped for writing (nested virtualisation) are dirty.  A
     * reading need not be the last one for that. */
    if (xc_logdirty_control(h->xch, domid,
                            clean ? XEN_DOMCTL_SHADOW_OP_CLEAN : XEN_DOMCTL_SHADOW_OP_PEEK,
                            HYPERCALL_BUFFER(buffer), nr_gfns,
                            clean ? XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL : 0, NULL) < 0)
        rc = -errno;
    else
        memcpy(bitmap, buffer, bytes);
    xc_hypercall_buffer_free_pages(h->xch, buffer, pages);
    return rc;
}
