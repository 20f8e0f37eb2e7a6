/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The simulated hypervisor's shared structures and calls (read by cffi as well). */

#define SIM_MAGIC 0x314d4953u          /* "SIM1" */
#define SIM_MAX_VCPUS 64
#define SIM_HEADER_BYTES 131072        /* struct sim_domain, then the p2m, then log-dirty */
#define SIM_HOST_OWNER 255             /* holder of p2m entries: the host; 1 to 254 are clients */
#define P2M_TOUCHED 0x800000           /* p2m entry: the frame was written since it was allocated */
#define SIM_STALL_BUCKETS 256          /* 8 to each power of two of microseconds */

/* p2m types: the values of xen/include/asm-x86/p2m.h, Xen 4.17 */
#define P2M_RAM_RW 0
#define P2M_HOLE 1
#define P2M_RAM_LOGDIRTY 2
#define P2M_MMIO 5
#define P2M_RAM_PAGING_OUT 9
#define P2M_RAM_PAGED 10
#define P2M_RAM_PAGING_IN 11
#define P2M_BROKEN 13

/* what sim_look() found at a pfn; numbers shared with xenbackend.pages.PageStatus */
#define PAGE_DATA 0
#define PAGE_ZERO 1
#define PAGE_HOLE 2
#define PAGE_PAGED 3
#define PAGE_BROKEN 4

/* guest programs */
#define PROGRAM_RANDOM 0
#define PROGRAM_SEQUENTIAL 1
#define PROGRAM_HOTSET 2
#define PROGRAM_STRIDE 3

/* why a guest is dead */
#define CRASH_NONE 0
#define CRASH_VCPU_INFO 1      /* register_vcpu_info failed with EINVAL: the frame was paged out */
#define CRASH_NO_RING 2        /* touched a paged-out page and nobody serves the ring */
#define CRASH_BAD_ACCESS 3     /* touched a hole, an mmio or a broken page */
/* ... and without a crash, because its kernel has ended */
#define CRASH_SHUT_DOWN 4
#define CRASH_REBOOTED 5

struct sim_program {
    uint32_t kind;
    uint32_t nr_vcpus;
    uint64_t seed;
    uint64_t pages;            /* working set: pages 0 .. pages - 1 */
    uint64_t stride;           /* in pages */
    uint32_t write_permille;   /* share of the accesses that write */
    uint32_t generated;        /* the image is sim_generate_image()'s: first reads are checked */
    uint64_t rate;             /* accesses of each vCPU in a second; 0: as many as it can make */
    uint64_t balloon_pages;    /* the number of pages that vCPU 0 gives away */
    uint64_t balloon_every;    /* one is given away after each so many of its accesses */
    uint64_t image_seed;
    uint32_t zero_permille;    /* share of zero pages of a generated image */
    uint32_t balloon_back;     /* they are taken back when all were given away, and so on */
    uint64_t hole_at;          /* the pages from this one on are behind the hole for devices */
    uint64_t hole_pfns;        /* the size of that hole */
};

struct sim_vcpu {
    uint64_t count;            /* accesses done: the whole architectural state of a vCPU */
    uint64_t errors;           /* reads that were not what the program had written */
    uint64_t first_error_pfn;
    uint64_t faults;
    uint64_t block_ns;
    uint64_t max_block_ns;
    uint64_t first_instruction_ns;  /* CLOCK_MONOTONIC; 0: the vCPU has not run here */
    uint64_t vcpu_info_pfn;
    uint32_t registered;
    uint32_t pad;
    uint32_t stalls[SIM_STALL_BUCKETS];
};

struct sim_domain {
    uint32_t magic;
    uint32_t nr_vcpus;
    uint64_t nr_pfns;
    uint32_t log_dirty;
    uint32_t paging;
    uint32_t crash;
    uint32_t crash_vcpu;
    uint32_t drops;            /* a paged-out page can be given away, and the pager is informed */
    /* a pfn that loses or gets a frame is log-dirty (Xen 4.19.5, 4.20.3, 4.21.1) */
    uint32_t tracks_physmap;
    uint64_t crash_pfn;
    uint64_t tot_pages;        /* frames that the domain owns */
    uint64_t max_pages;        /* frames that it may own; if it has more, it keeps them */
    uint64_t untracked;        /* a frame was added since log-dirty was cleaned (see above) */
    uint64_t balloon_steps;    /* pages that vCPU 0 has given away or taken back: of the context */
    uint64_t ended_suspended;  /* the domain was suspended when it was destroyed */
    uint64_t ever_ran;         /* the guest has been started here */
    uint64_t overlaid;         /* frames that the guest got for pfns that still had memory */
    uint64_t paged_pages;
    uint64_t spurious_responses;   /* responses to a vCPU that did not wait */
    uint64_t premature_responses;  /* responses before the page was present or dropped */
    uint64_t lost_drops;           /* drop requests that found the ring full */
    struct sim_program program;
    struct sim_vcpu vcpu[SIM_MAX_VCPUS];
};

/* One process's mapping of a domain. */
struct sim_map {
    struct sim_domain *dom;
    uint32_t *p2m;
    uint64_t *dirty;
    uint64_t *untracked;        /* pfns whose writes are not recorded until log-dirty is cleaned */
    uint8_t *memory;
    int memory_fd;
    uint32_t owner;
    uint64_t control_bytes;
};

/* Neighbouring pages. */
struct sim_run {
    uint64_t first;
    uint64_t pages;
};

/* ---- hypercalls (hypercalls.c); negative results are -errno ---- */
uint64_t sim_control_bytes(uint64_t nr_pfns);
int sim_attach(struct sim_map *m, int control_fd, int memory_fd, uint32_t owner);
void sim_detach(struct sim_map *m);
void sim_repair(struct sim_map *m, uint32_t dead_owner);

int sim_page_types(struct sim_map *m, const uint64_t *pfns, size_t n, uint8_t *types);
size_t sim_look(struct sim_map *m, const uint64_t *pfns, size_t n, uint8_t *status,
                struct sim_run *runs);
int sim_write(struct sim_map *m, const uint64_t *pfns, size_t n, const uint8_t *pages,
              size_t *done);
int sim_populate(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done);
int sim_depopulate(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done);
int sim_populate_evicted(struct sim_map *m, const uint64_t *pfns, size_t n, size_t *done);
int sim_nominate(struct sim_map *m, uint64_t pfn);
int sim_evict(struct sim_map *m, uint64_t pfn);
int sim_look_at(struct sim_map *m, uint64_t pfn, const void **page);
int sim_load_at(struct sim_map *m, uint64_t pfn, const void *page);
long sim_load(struct sim_map *m, const uint64_t *pfns, size_t n, const uint8_t *pages,
              int32_t *results);
uint64_t sim_log_dirty(struct sim_map *m, uint64_t *bitmap, int clean);
size_t sim_pinned(struct sim_map *m, const uint64_t *pfns, size_t n, uint64_t *pinned);
size_t sim_held(struct sim_map *m, const uint64_t *pfns, size_t n, uint64_t *held);
int sim_map_grant(struct sim_map *m, uint64_t pfn);
void sim_unmap_grant(struct sim_map *m, uint64_t pfn);
int sim_set_page(struct sim_map *m, uint64_t pfn, int type, int refs, int type_count);

/* ---- guest programs (program.c) ---- */
struct sim_access {
    uint64_t page;
    uint64_t visit;      /* how often this vCPU has visited this page before */
};
struct sim_access sim_access_at(const struct sim_program *p, uint32_t vcpu, uint64_t k);
uint64_t sim_pfn(const struct sim_program *program, uint64_t page);
void sim_generate_image(struct sim_map *m, uint64_t from, uint64_t n);
void sim_image_pages(const struct sim_program *program, uint64_t from, uint64_t n, uint8_t *pages);
void sim_expected_visits(const struct sim_program *program, uint32_t vcpu, uint64_t count,
                         uint64_t *visits);
void sim_compare_pages(const struct sim_program *program, uint64_t from, uint64_t n,
                       const uint64_t *visits, const uint64_t *taken, uint8_t *pages,
                       const uint8_t *actual, uint8_t *differs);
uint64_t sim_balloon_page(const struct sim_program *program, uint64_t nr_pfns, uint64_t number);
uint64_t sim_balloon_due(const struct sim_program *program, uint64_t count);
uint64_t sim_balloon_given(const struct sim_program *program, uint64_t steps, uint64_t number);
uint64_t sim_balloon_taken(const struct sim_program *program, uint64_t steps, uint64_t number);

/* ---- vCPUs (vcpu.c, pause.c) and paging (paging.c): in the host's process only ---- */
struct sim_host_domain;
/* Make the domain with its vCPUs paused.  NULL: the system has no threads for them. */
struct sim_host_domain *sim_host_new(struct sim_map *m);
void sim_host_free(struct sim_host_domain *h);      /* ends the threads */
int sim_host_resume_guest(struct sim_host_domain *h);   /* first run here: register vcpu_info */
void sim_host_pause(struct sim_host_domain *h);     /* returns when no vCPU runs */
void sim_host_unpause(struct sim_host_domain *h);
void sim_host_paging_enable(struct sim_host_domain *h, void *ring_page, int to_pager_fd,
                            int from_pager_fd);
int sim_host_paging_disable(struct sim_host_domain *h);
