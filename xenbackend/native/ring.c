/*
 * The pager's end of the paging ring.
 *
 * In C because the indices need memory barriers that Python cannot give: the
 * other end is a hypervisor on another CPU.  Keeps count so that no request can be
 * answered twice: see ring_respond().
 */
#include <errno.h>
#include <unistd.h>
#include "vm_event.h"
#include "ring_api.h"

int ring_consume(struct ring_state *ring, struct ring_request *out)
{
    struct vm_event_sring *sring = ring->page;
    uint64_t count;
    int n = 0;

    if (ring->event_fd >= 0 && read(ring->event_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        return -errno;
    for (;;) {
        uint32_t prod = __atomic_load_n(&sring->req_prod, __ATOMIC_ACQUIRE);

        if (prod - ring->rsp_prod > VM_EVENT_SLOTS)
            return -EPROTO;
        while (ring->req_cons != prod) {
            struct vm_event *req = vm_event_slot(sring, ring->req_cons);

            if (req->version != VM_EVENT_INTERFACE_VERSION ||
                req->reason != VM_EVENT_REASON_MEM_PAGING)
                return -EPROTO;
            out[n++] = (struct ring_request){
                .gfn = req->gfn,
                .vcpu_id = req->vcpu_id,
                .flags = req->flags,
                .paging_flags = req->paging_flags,
                .p2mt = req->p2mt,
            };
            ring->req_cons++;
        }
        /* Ask for an event at the next request, then look once more: one that came
         * in between has seen the old req_event and may not have raised it. */
        __atomic_store_n(&sring->req_event, ring->req_cons + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&sring->req_prod, __ATOMIC_SEQ_CST) == ring->req_cons ||
            n == VM_EVENT_SLOTS)
            return n;
    }
}

int ring_respond(struct ring_state *ring, const struct ring_request *answered, int n)
{
    struct vm_event_sring *sring = ring->page;
    const uint64_t one = 1;

    if (n < 0 || (uint32_t)n > ring->req_cons - ring->rsp_prod)
        return -EINVAL;
    for (int i = 0; i < n; i++) {
        struct vm_event *rsp = vm_event_slot(sring, ring->rsp_prod + i);

        memset(rsp, 0, sizeof(*rsp));
        rsp->version = VM_EVENT_INTERFACE_VERSION;
        rsp->flags = answered[i].flags;
        rsp->reason = VM_EVENT_REASON_MEM_PAGING;
        rsp->vcpu_id = answered[i].vcpu_id;
        rsp->gfn = answered[i].gfn;
        rsp->p2mt = answered[i].p2mt;
        rsp->paging_flags = answered[i].paging_flags;
    }
    ring->rsp_prod += n;
    __atomic_store_n(&sring->rsp_prod, ring->rsp_prod, __ATOMIC_SEQ_CST);
    if (ring->notify_fd >= 0 && write(ring->notify_fd, &one, sizeof(one)) < 0)
        return -errno;
    return 0;
}
