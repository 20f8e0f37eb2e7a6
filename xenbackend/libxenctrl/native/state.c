/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The state of a guest besides its memory: vCPU and device context, parameters, time, CPU policy;
 * and the empty domain that takes in the state.
 *
 * Sources: tools/include/xenctrl.h, xenguest.h; xen/include/public/domctl.h, hvm/params.h (Xen
 * 4.17).
 */
#include "internal.h"
#include <xenguest.h>

#ifndef DOMID_ANY   /* before Xen 4.22 */
#define DOMID_ANY 0
#endif

_Static_assert(sizeof(xen_cpuid_leaf_t) == XEN_CPUID_LEAF_BYTES, "CPUID leaves");
_Static_assert(sizeof(xen_msr_entry_t) == XEN_MSR_ENTRY_BYTES, "MSR entries");

int xen_tsc_get(struct xen_host *h, uint32_t domid, struct xen_tsc *out)
{
    *out = (struct xen_tsc){ 0 };
    return xc_domain_get_tsc_info(h->xch, domid, &out->mode, &out->elapsed_nsec, &out->khz,
                                  &out->incarnation) ? -errno : 0;
}

int xen_tsc_set(struct xen_host *h, uint32_t domid, const struct xen_tsc *tsc)
{
    return xc_domain_set_tsc_info(h->xch, domid, tsc->mode, tsc->elapsed_nsec, tsc->khz,
                                  tsc->incarnation) ? -errno : 0;
}

int xen_param_get(struct xen_host *h, uint32_t domid, uint32_t index, uint64_t *out)
{
    return xc_hvm_param_get(h->xch, domid, index, out) ? -errno : 0;
}

int xen_param_set(struct xen_host *h, uint32_t domid, uint32_t index, uint64_t value)
{
    return xc_hvm_param_set(h->xch, domid, index, value) ? -errno : 0;
}

int xen_hvm_context(struct xen_host *h, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    int rc = xc_domain_hvm_getcontext(h->xch, domid, buffer, size);

    return rc < 0 ? -errno : rc;
}

int xen_set_hvm_context(struct xen_host *h, uint32_t domid, const uint8_t *buffer, uint32_t size)
{
    return xc_domain_hvm_setcontext(h->xch, domid, (uint8_t *)buffer, size) ? -errno : 0;
}

/* ---- CPU policy ---- */
int xen_cpu_policy_size(struct xen_host *h, uint32_t *leaves, uint32_t *msrs)
{
    return xc_cpu_policy_get_size(h->xch, leaves, msrs) ? -errno : 0;
}

int xen_cpu_policy(struct xen_host *h, uint32_t domid, uint8_t *leaves, uint32_t *nr_leaves,
                   uint8_t *msrs, uint32_t *nr_msrs)
{
    xc_cpu_policy_t *policy = xc_cpu_policy_init();
    int rc = -ENOMEM;

    if (policy)
        rc = xc_cpu_policy_get_domain(h->xch, domid, policy) ||
             xc_cpu_policy_serialise(h->xch, policy, (xen_cpuid_leaf_t *)leaves, nr_leaves,
                                     (xen_msr_entry_t *)msrs, nr_msrs)
                 ? -errno : 0;
    xc_cpu_policy_destroy(policy);
    return rc;
}

int xen_set_cpu_policy(struct xen_host *h, uint32_t domid, const uint8_t *leaves,
                       uint32_t nr_leaves, const uint8_t *msrs, uint32_t nr_msrs,
                       struct xen_policy_error *error)
{
    *error = (struct xen_policy_error){ -1, -1, -1 };
    return xc_set_domain_cpu_policy(h->xch, domid, nr_leaves, (xen_cpuid_leaf_t *)leaves, nr_msrs,
                                    (xen_msr_entry_t *)msrs, &error->leaf, &error->subleaf,
                                    &error->msr) ? -errno : 0;
}

/* ---- an empty domain ---- */
int xen_create(struct xen_host *h, const struct xen_info *info, uint32_t *domid)
{
    struct xen_domctl_createdomain config = {
        .flags = XEN_DOMCTL_CDF_hvm | (info->hap ? XEN_DOMCTL_CDF_hap : 0),
        .max_vcpus = info->vcpus, .max_evtchn_port = 1023,      /* as libxl has it */
        .max_grant_frames = -1, .max_maptrack_frames = -1,
        .grant_opts = XEN_DOMCTL_GRANT_version(2),
        .arch = { .emulation_flags = info->emulation_flags, .misc_flags = info->misc_flags },
    };

    memcpy(config.handle, info->handle, sizeof(config.handle));
    *domid = DOMID_ANY;
    if (xc_domain_create(h->xch, domid, &config))
        return -errno;
    if (xc_domain_max_vcpus(h->xch, *domid, info->vcpus)) {
        int rc = -errno;

        xc_domain_destroy(h->xch, *domid);
        return rc;
    }
    return 0;
}

int xen_paging_pool(struct xen_host *h, uint32_t domid, uint32_t mib)
{
    unsigned int mb = mib;

    return xc_shadow_control(h->xch, domid, XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION, &mb, 0) < 0
           ? -errno : 0;
}

int xen_event_channel(struct xen_host *h, uint32_t domid)
{
    int port = xc_evtchn_alloc_unbound(h->xch, domid, 0);

    return port < 0 ? -errno : port;
}

int xen_seed_grants(struct xen_host *h, uint32_t domid, uint64_t console_gfn, uint64_t store_gfn,
                    uint32_t console_domid, uint32_t store_domid)
{
    return xc_dom_gnttab_seed(h->xch, domid, 1, console_gfn, store_gfn, console_domid, store_domid)
           ? -errno : 0;
}
