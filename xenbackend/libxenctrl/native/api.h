/* What Python sees of xen.c (this file is read by cffi as well).
 *
 * Calls return 0 (or a count) or -errno.  Batches stop at the first gfn that fails; *done is how many were
 * handled before it. */

struct xen_host;

int xen_host_open(struct xen_host **out);
void xen_host_close(struct xen_host *h);

struct xen_info {
    uint64_t tot_pages, max_pages, paged_pages;
    uint64_t nr_gfns;           /* one more than the highest gfn in use */
    uint32_t vcpus;
    uint32_t paused, shutdown, shutdown_reason, dying, hap;
};

/* ---- life ---- */
int xen_domain_info(struct xen_host *h, uint32_t domid, struct xen_info *out);
int xen_pause(struct xen_host *h, uint32_t domid);
int xen_unpause(struct xen_host *h, uint32_t domid);

/* ---- memory ---- */
/* Foreign mapping of n gfns, one behind the other, read-only; errors[i] is 0 or an errno.  Touching a page
 * whose errors[i] is not 0 is a SIGBUS.  A gfn that is paged out is waited for: never from a pager's thread. */
int xen_map(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, void **address, int *errors);
int xen_unmap(struct xen_host *h, void *address, size_t n);
int xen_set_max_pages(struct xen_host *h, uint32_t domid, uint64_t pages);
int xen_populate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done);
int xen_depopulate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done);

/* ---- paging ---- */
struct xen_pager {
    void *ring_page;
    uint32_t port;              /* the local end of the event channel */
    int event_fd;               /* readable when the channel has fired */
    void *evtchn;
};

/* 0 where the hypervisor was built with memory paging, -ENOSYS where not.  Changes nothing. */
int xen_probe_paging(struct xen_host *h, uint32_t domid);
/* Undoes what it did when it fails, but for the parameter that names the ring's gfn. */
int xen_paging_enable(struct xen_host *h, uint32_t domid, struct xen_pager *out);
/* Take note of an event (then the channel can fire again); tell Xen of responses. */
int xen_event_take(struct xen_pager *pager);
int xen_event_notify(struct xen_pager *pager);
int xen_paging_disable(struct xen_host *h, uint32_t domid, struct xen_pager *pager);

/* 0 where the hypervisor has the batched op, -ENOSYS where not; needs an enabled ring (-ENODEV). */
int xen_probe_populate_evicted(struct xen_host *h, uint32_t domid);
int xen_populate_evicted(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done);
/* The same by what every hypervisor with paging has: populate the holes, nominate, evict. */
int xen_evict_one_by_one(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done);

/* XENMEM_paging_op_prep with a buffer; results[i] is 0 or -errno.  pages == NULL loads zeros. */
int xen_load(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, const uint8_t *pages, int32_t *results);
