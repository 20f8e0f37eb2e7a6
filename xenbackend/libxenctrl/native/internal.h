/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the C files share.  Each file calls only earlier ones: call.c, host.c, memory.c, then the
 * others. */
#ifndef XEN_POSTCOPY_INTERNAL_H
#define XEN_POSTCOPY_INTERNAL_H

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <xencall.h>
#include <xenctrl.h>
#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xenstore.h>
#include <xen/hvm/params.h>
#include <xen/memory.h>
#include "api.h"

#define BUFFERS 4           /* so many threads load or evict without waiting for each other */
#define BATCH_GFNS 1024     /* the most of one hypercall (getpageframeinfo3 takes no more) */
#define DATA_PAGES (BATCH_GFNS * sizeof(uint64_t) / XC_PAGE_SIZE)

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
    xendevicemodel_handle *dmod;
    struct xs_handle *store;
    uint32_t has_populate_evicted;
    struct call_buffer buffer[BUFFERS];
};

/* ---- call.c ---- */
int make_buffers(struct xen_host *h);
void free_buffers(struct xen_host *h);      /* frees the buffers that were made */
struct call_buffer *take_buffer(struct xen_host *h);
static inline void give_buffer(struct call_buffer *b) { pthread_mutex_unlock(&b->lock); }
/* XENMEM_paging_op, on a buffer that the caller has taken. */
int paging_op(struct xen_host *h, struct call_buffer *b, uint32_t domid, uint8_t op,
              const void *buffer, uint64_t gfn);

/* ---- memory.c ---- */
/* Populate one batch.  All gfns must be holes, and none may be in the batch twice. */
int populate_holes(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                   size_t *done);

/* Our own operations: xenbackend/hypervisor/ */
#ifndef XENMEM_paging_op_populate_evicted
#define XENMEM_paging_op_populate_evicted 3
#define XENMEM_paging_op_query_held 4
#define XENMEM_paging_op_list_pinned 5
#endif

static inline size_t batch_of(size_t left) { return left < BATCH_GFNS ? left : BATCH_GFNS; }

#endif
