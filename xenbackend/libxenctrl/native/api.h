/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The interface of the C files beside this one for Python (read by cffi as well).
 *
 * Calls return 0 (or a count) or -errno.  Batches stop at the first gfn that fails; *done is the
 * number of gfns that were handled before it. */

struct xen_host;

/* ---- host.c ---- */
int xen_host_open(struct xen_host **out);
void xen_host_close(struct xen_host *h);

struct xen_facts {
    uint64_t free_pages;
    uint32_t dom0_hvm;          /* dom0 is not a PV domain */
    uint32_t hap;               /* the processors have nested page tables */
    uint32_t paging;            /* the hypervisor is built with memory paging */
    uint32_t populate_evicted;  /* the hypervisor has our operations (xenbackend/hypervisor/) */
};
int xen_facts(struct xen_host *h, struct xen_facts *out);

struct xen_info {
    uint64_t tot_pages, max_pages, paged_pages, shared_info_gfn;
    uint64_t cpu_ns;                        /* for which its vCPUs have run */
    uint32_t domid, vcpus, hvm, hap, paused, dying;
    uint32_t shutdown, shutdown_reason;     /* SHUTDOWN_* */
    uint32_t emulation_flags, misc_flags, gpaddr_bits, pad;
    uint8_t handle[16];
};
int xen_domain_info(struct xen_host *h, uint32_t domid, struct xen_info *out);
int xen_domain_list(struct xen_host *h, uint32_t first_domid, struct xen_info *out, uint32_t most);
/* One more than the highest gfn in use. */
int xen_nr_gfns(struct xen_host *h, uint32_t domid, uint64_t *out);
int xen_pod_entries(struct xen_host *h, uint32_t domid, uint64_t *out);

int xen_pause(struct xen_host *h, uint32_t domid);
int xen_unpause(struct xen_host *h, uint32_t domid);
int xen_shutdown(struct xen_host *h, uint32_t domid, int reason);
/* Resume a suspended domain; the hypercall with which it suspended returns "cancelled". */
int xen_resume(struct xen_host *h, uint32_t domid);
int xen_destroy(struct xen_host *h, uint32_t domid);

/* xenstored.  Read returns the length of the value, and puts up to size bytes of it into buffer. */
int xen_store_read(struct xen_host *h, const char *path, char *buffer, uint32_t size);
int xen_store_write(struct xen_host *h, const char *path, const char *value, uint32_t length);
int xen_store_remove(struct xen_host *h, const char *path);
/* Give the node to owner, and let the domain may_read read it. */
int xen_store_permit(struct xen_host *h, const char *path, uint32_t owner, uint32_t may_read);
int xen_store_introduce(struct xen_host *h, uint32_t domid, uint64_t gfn, uint32_t port);
int xen_store_resume(struct xen_host *h, uint32_t domid);

/* ---- memory.c ---- */
#define PAGE_DATA 0             /* numbers shared with xenbackend.pages.PageStatus */
#define PAGE_ZERO 1
#define PAGE_HOLE 2
#define PAGE_PAGED 3
#define PAGE_BROKEN 4

/* The types of pages, without their contents: PAGE_DATA, PAGE_HOLE, PAGE_PAGED, PAGE_BROKEN. */
int xen_page_types(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                   uint8_t *types);

/* Memory mapped for reading. */
struct xen_view {
    void *address;
    size_t pages;
};
/* Map the gfns that have memory. status is a PAGE_* for each gfn; pages has the address of each
 * page that has PAGE_DATA. */
int xen_map(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint8_t *status,
            const void **pages, struct xen_view *view);
struct xen_run {                /* neighbours in memory */
    const void *address;
    uint64_t pages;
};
/* Read the mapped pages that have PAGE_DATA.  Pages of zeros become PAGE_ZERO, and the others are
 * put into runs.  Returns the number of runs. */
size_t xen_look(const void *const *pages, size_t n, uint8_t *status, struct xen_run *runs);
int xen_unmap(struct xen_host *h, struct xen_view *view);

int xen_set_max_pages(struct xen_host *h, uint32_t domid, uint64_t pages);
/* Set the domain's claim, which replaces an earlier one.  If the domain has so many pages already,
 * it gets no claim. */
int xen_claim(struct xen_host *h, uint32_t domid, uint64_t pages);
int xen_populate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, size_t *done);
int xen_depopulate(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                   size_t *done);
int xen_write(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
              const uint8_t *pages, size_t *done);

/* -EBUSY: log-dirty is on already. */
int xen_log_dirty_enable(struct xen_host *h, uint32_t domid);
int xen_log_dirty_disable(struct xen_host *h, uint32_t domid);
/* Returns 1 if log-dirty is on, 0 if it is off, or -errno. */
int xen_log_dirty_is_on(struct xen_host *h, uint32_t domid);
int xen_log_dirty(struct xen_host *h, uint32_t domid, int clean, uint8_t *bitmap, uint64_t nr_gfns);

/* ---- pinned.c ---- */
/* Put those of the ascending gfns that belong to the pinned set into out, in any order, and return
 * their number. */
long xen_pinned(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint64_t *out);
/* The two sources of xen_pinned() besides HVM parameters.  The first puts up to 1024 gfns into out,
 * and needs a hypervisor with our patch (otherwise -ENOSYS).  The second works on any. */
long xen_list_pinned(struct xen_host *h, uint32_t domid, uint64_t *out);
long xen_recognise_pinned(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                          uint64_t *out);
/* Put the gfns whose frames have references besides the guest's own into out, and return their
 * number.  The upper bits of a gfn may have the number of this process's mappings of it, which are
 * not counted.  Only a hypervisor with our patch reports such gfns; any other has none. */
#define HOLDS_SHIFT 56
long xen_held(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint64_t *out);

/* ---- paging.c ---- */
struct xen_pager {
    void *ring_page;
    uint64_t ring_gfn;
    uint32_t remote_port;       /* Xen's end of the event channel, and ours */
    uint32_t port;
    int event_fd;               /* readable when the channel has fired */
    void *evtchn;
};

/* Returns 1 if the domain has a ring, 0 if it has none, or -errno.  Changes nothing. */
int xen_has_ring(struct xen_host *h, uint32_t domid);
/* spare_gfn: the place for the ring, if the domain has none.  After an error everything is undone,
 * except the parameter that names the ring's gfn. */
int xen_paging_enable(struct xen_host *h, uint32_t domid, uint64_t spare_gfn,
                      struct xen_pager *out);
/* Attach to a ring whose pager has died.  -EBUSY: the pager lives. */
int xen_paging_attach(struct xen_host *h, uint32_t domid, struct xen_pager *out);
/* xen_event_take consumes an event, so that the channel can fire again; the other call informs Xen
 * of responses. */
int xen_event_take(struct xen_pager *pager);
int xen_event_notify(struct xen_pager *pager);
int xen_paging_disable(struct xen_host *h, uint32_t domid, struct xen_pager *pager);
/* Release the pager's resources, as the end of the process would.  The ring stays. */
void xen_pager_close(struct xen_host *h, struct xen_pager *pager);

int xen_populate_evicted(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                         size_t *done);
/* Do the same with the operations of every hypervisor with paging: populate the holes, nominate,
 * evict. */
int xen_evict_one_by_one(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                         size_t *done);

/* XENMEM_paging_op_prep with a buffer; results[i] is 0 or -errno.  pages == NULL loads zeros. */
int xen_load(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
             const uint8_t *pages, int32_t *results);

/* ---- one_page.c ---- */
/* For native code that serves faults: the struct NativePages of xenbackend/pages.py, and NativeRing
 * of ring.py. */
struct xen_held {               /* pages that stay mapped (held.py) */
    const uint32_t *slot;       /* of each gfn, or NOT_HELD */
    const uint64_t *address;    /* of each chunk of CHUNK_PAGES slots */
    uint32_t looking;           /* the number of these pages that are being read */
};
#define NOT_HELD 4294967295
#define CHUNK_PAGES 1024
/* Returns whether slots that were made NOT_HELD may be unmapped.  Called under a Python lock. */
int xen_held_idle(struct xen_held *held);

struct xen_domain {
    struct xen_host *host;
    uint32_t domid;
    uint64_t ring_gfn;          /* no memory of the guest, if it is not 0 */
    struct xen_held *held;      /* or NULL */
};
/* Returns a PAGE_*.  If it is PAGE_DATA, the page is mapped at *page until xen_looked_at. */
int xen_look_at(struct xen_domain *d, uint64_t gfn, const void **page);
void xen_looked_at(struct xen_domain *d, const void *page);
/* Returns 0 or -errno. */
int xen_load_at(struct xen_domain *d, uint64_t gfn, const void *page);

struct xen_ring {
    struct xen_pager *pager;
    void *ring;                 /* for xenbackend/native/ring.c's calls, which send no events */
    int (*consume)(void *ring, void *out);
    int (*respond)(void *ring, const void *answered, int n);
};
int xen_ring_consume(struct xen_ring *r, void *out);
int xen_ring_respond(struct xen_ring *r, const void *answered, int n);

/* ---- state.c ---- */
struct xen_tsc {
    uint64_t elapsed_nsec;
    uint32_t mode, khz, incarnation, pad;
};
int xen_tsc_get(struct xen_host *h, uint32_t domid, struct xen_tsc *out);
int xen_tsc_set(struct xen_host *h, uint32_t domid, const struct xen_tsc *tsc);
int xen_param_get(struct xen_host *h, uint32_t domid, uint32_t index, uint64_t *out);
int xen_param_set(struct xen_host *h, uint32_t domid, uint32_t index, uint64_t value);
/* Returns the size of the context; with buffer == NULL, the size of the buffer that it needs. */
int xen_hvm_context(struct xen_host *h, uint32_t domid, uint8_t *buffer, uint32_t size);
int xen_set_hvm_context(struct xen_host *h, uint32_t domid, const uint8_t *buffer, uint32_t size);

#define XEN_CPUID_LEAF_BYTES 24     /* xen_cpuid_leaf_t */
#define XEN_MSR_ENTRY_BYTES 16      /* xen_msr_entry_t */
int xen_cpu_policy_size(struct xen_host *h, uint32_t *leaves, uint32_t *msrs);
int xen_cpu_policy(struct xen_host *h, uint32_t domid, uint8_t *leaves, uint32_t *nr_leaves,
                   uint8_t *msrs, uint32_t *nr_msrs);
/* The part of a policy that Xen has refused; all bits are set where there is none. */
struct xen_policy_error {
    uint32_t leaf, subleaf, msr;
};
int xen_set_cpu_policy(struct xen_host *h, uint32_t domid, const uint8_t *leaves,
                       uint32_t nr_leaves, const uint8_t *msrs, uint32_t nr_msrs,
                       struct xen_policy_error *error);

/* Create an empty HVM or PVH domain with the properties in info. */
int xen_create(struct xen_host *h, const struct xen_info *info, uint32_t *domid);
int xen_paging_pool(struct xen_host *h, uint32_t domid, uint32_t mib);
/* Allocate a port to which dom0 may bind. */
int xen_event_channel(struct xen_host *h, uint32_t domid);
int xen_seed_grants(struct xen_host *h, uint32_t domid, uint64_t console_gfn, uint64_t store_gfn,
                    uint32_t console_domid, uint32_t store_domid);
