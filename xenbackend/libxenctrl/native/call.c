/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Hypercalls that libxenctrl does not make, or makes too slowly.
 *
 * libxenctrl allocates a hypercall buffer for each page that it loads, which costs more than the
 * call itself, and libxenctrl does not have our operations.  So XENMEM_paging_op is called here
 * with xencall, on buffers that are kept.
 *
 * Sources: xen/include/public/memory.h; tools/include/xencall.h (Xen 4.17).
 */
#include "internal.h"

int make_buffers(struct xen_host *h)
{
    for (int i = 0; i < BUFFERS; i++) {
        pthread_mutex_init(&h->buffer[i].lock, NULL);
        h->buffer[i].op = xencall_alloc_buffer_pages(h->call, 1);
        h->buffer[i].data = xencall_alloc_buffer_pages(h->call, DATA_PAGES);
        if (!h->buffer[i].op || !h->buffer[i].data)
            return -ENOMEM;
    }
    return 0;
}

void free_buffers(struct xen_host *h)
{
    for (int i = 0; i < BUFFERS; i++) {
        if (h->buffer[i].op) {
            pthread_mutex_destroy(&h->buffer[i].lock);
            xencall_free_buffer_pages(h->call, h->buffer[i].op, 1);
        }
        if (h->buffer[i].data)
            xencall_free_buffer_pages(h->call, h->buffer[i].data, DATA_PAGES);
    }
}

struct call_buffer *take_buffer(struct xen_host *h)
{
    for (int i = 0; i < BUFFERS; i++)
        if (!pthread_mutex_trylock(&h->buffer[i].lock))
            return &h->buffer[i];
    pthread_mutex_lock(&h->buffer[0].lock);
    return &h->buffer[0];
}

int paging_op(struct xen_host *h, struct call_buffer *b, uint32_t domid, uint8_t op,
              const void *buffer, uint64_t gfn)
{
    memset(b->op, 0, sizeof(*b->op));
    b->op->op = op;
    b->op->domain = domid;
    set_xen_guest_handle_raw(b->op->buffer, buffer);
    b->op->gfn = gfn;
    return xencall2(h->call, __HYPERVISOR_memory_op, XENMEM_paging_op, (uintptr_t)b->op) < 0
           ? -errno : 0;
}
