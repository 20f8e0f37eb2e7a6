/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One host's Xen: its abilities, its domains, their life cycle, and xenstored.
 *
 * Sources: tools/include/xenctrl.h, xenguest.h, xenstore.h; xen/include/public/domctl.h, sysctl.h
 * (Xen 4.17).
 */
#include "internal.h"
#include <xenguest.h>

void xen_host_close(struct xen_host *h)
{
    free_buffers(h);
    if (h->store)
        xs_close(h->store);
    if (h->dmod)
        xendevicemodel_close(h->dmod);
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
    struct xen_facts facts = { 0 };
    int rc;

    if (!h)
        return -ENOMEM;
    h->xch = xc_interface_open(NULL, NULL, 0);
    h->call = h->xch ? xencall_open(NULL, 0) : NULL;
    h->fmem = h->call ? xenforeignmemory_open(NULL, 0) : NULL;
    h->dmod = h->fmem ? xendevicemodel_open(NULL, 0) : NULL;
    h->store = h->dmod ? xs_open(0) : NULL;
    rc = h->store ? make_buffers(h) : errno ? -errno : -ENODEV;
    if (!rc)
        rc = xen_facts(h, &facts);
    if (rc) {
        xen_host_close(h);
        return rc;
    }
    h->has_populate_evicted = facts.populate_evicted;
    *out = h;
    return 0;
}

int xen_facts(struct xen_host *h, struct xen_facts *out)
{
    struct call_buffer *b;
    xc_domaininfo_t dom0;
    xc_physinfo_t phys = { 0 };
    int rc;

    if (xc_physinfo(h->xch, &phys) || xc_domain_getinfolist(h->xch, 0, 1, &dom0) < 0)
        return -errno;
    *out = (struct xen_facts){ .free_pages = phys.free_pages - phys.outstanding_pages,
                               .dom0_hvm = !!(dom0.flags & XEN_DOMINF_hvm_guest),
                               .hap = !!(phys.capabilities & XEN_SYSCTL_PHYSCAP_hap) };
    b = take_buffer(h);
    /* For a domid of no domain Xen returns ESRCH, unless the hypervisor is built without paging. */
    rc = paging_op(h, b, DOMID_INVALID, XENMEM_paging_op_nominate, NULL, 0);
    out->paging = rc == -ESRCH;
    if (out->paging)
        out->populate_evicted =
            !paging_op(h, b, DOMID_INVALID, XENMEM_paging_op_populate_evicted, NULL, 0);
    give_buffer(b);
    return out->paging || rc == -ENOSYS ? 0 : rc;
}

static struct xen_info info_of(const xc_domaininfo_t *info)
{
    struct xen_info out = {
        .tot_pages = info->tot_pages, .max_pages = info->max_pages,
        .paged_pages = info->paged_pages, .shared_info_gfn = info->shared_info_frame,
        .cpu_ns = info->cpu_time, .domid = info->domain,
        .vcpus = info->max_vcpu_id == XEN_INVALID_MAX_VCPU_ID ? 0 : info->max_vcpu_id + 1,
        .hvm = !!(info->flags & XEN_DOMINF_hvm_guest), .hap = !!(info->flags & XEN_DOMINF_hap),
        .paused = !!(info->flags & XEN_DOMINF_paused), .dying = !!(info->flags & XEN_DOMINF_dying),
        .shutdown = !!(info->flags & XEN_DOMINF_shutdown),
        .shutdown_reason = info->flags >> XEN_DOMINF_shutdownshift & XEN_DOMINF_shutdownmask,
        .emulation_flags = info->arch_config.emulation_flags,
        .misc_flags = info->arch_config.misc_flags,
        .gpaddr_bits = info->gpaddr_bits,
    };

    memcpy(out.handle, info->handle, sizeof(out.handle));
    return out;
}

int xen_domain_info(struct xen_host *h, uint32_t domid, struct xen_info *out)
{
    xc_domaininfo_t info;
    int found = xc_domain_getinfolist(h->xch, domid, 1, &info);

    if (found < 0)
        return -errno;
    if (!found || info.domain != domid)
        return -ESRCH;
    *out = info_of(&info);
    return 0;
}

int xen_domain_list(struct xen_host *h, uint32_t first_domid, struct xen_info *out, uint32_t most)
{
    xc_domaininfo_t *info = calloc(most, sizeof(*info));
    int found = info ? xc_domain_getinfolist(h->xch, first_domid, most, info) : -1;

    for (int i = 0; i < found; i++)
        out[i] = info_of(&info[i]);
    free(info);
    return found < 0 ? -errno : found;
}

int xen_nr_gfns(struct xen_host *h, uint32_t domid, uint64_t *out)
{
    xen_pfn_t nr;

    if (xc_domain_nr_gpfns(h->xch, domid, &nr) < 0)
        return -errno;
    *out = nr;
    return 0;
}

int xen_pod_entries(struct xen_host *h, uint32_t domid, uint64_t *out)
{
    uint64_t tot, cache;

    return xc_domain_get_pod_target(h->xch, domid, &tot, &cache, out) ? -errno : 0;
}

int xen_pause(struct xen_host *h, uint32_t domid)
{
    return xc_domain_pause(h->xch, domid) ? -errno : 0;
}
int xen_unpause(struct xen_host *h, uint32_t domid)
{
    return xc_domain_unpause(h->xch, domid) ? -errno : 0;
}
int xen_destroy(struct xen_host *h, uint32_t domid)
{
    return xc_domain_destroy(h->xch, domid) ? -errno : 0;
}
int xen_resume(struct xen_host *h, uint32_t domid)
{
    return xc_domain_resume(h->xch, domid, 1) ? -errno : 0;
}

int xen_shutdown(struct xen_host *h, uint32_t domid, int reason)
{
    return xc_domain_shutdown(h->xch, domid, reason) ? -errno : 0;
}

/* ---- xenstored ---- */
int xen_store_read(struct xen_host *h, const char *path, char *buffer, uint32_t size)
{
    unsigned int length;
    char *value = xs_read(h->store, XBT_NULL, path, &length);

    if (!value)
        return -errno;
    memcpy(buffer, value, length < size ? length : size);
    free(value);
    return length;
}

int xen_store_write(struct xen_host *h, const char *path, const char *value, uint32_t length)
{
    return xs_write(h->store, XBT_NULL, path, value, length) ? 0 : -errno;
}

int xen_store_remove(struct xen_host *h, const char *path)
{
    return xs_rm(h->store, XBT_NULL, path) ? 0 : -errno;
}

int xen_store_permit(struct xen_host *h, const char *path, uint32_t owner, uint32_t may_read)
{
    struct xs_permissions permissions[] = { { .id = owner, .perms = XS_PERM_NONE },
                                            { .id = may_read, .perms = XS_PERM_READ } };

    return xs_set_permissions(h->store, XBT_NULL, path, permissions, 2) ? 0 : -errno;
}

int xen_store_introduce(struct xen_host *h, uint32_t domid, uint64_t gfn, uint32_t port)
{
    return xs_introduce_domain(h->store, domid, gfn, port) ? 0 : -errno;
}

int xen_store_resume(struct xen_host *h, uint32_t domid)
{
    return xs_resume_domain(h->store, domid) ? 0 : -errno;
}
