/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The pager's end of the paging ring.
 *
 * This is in C because the indices need memory barriers, which Python does not have: the other end
 * is a hypervisor on another CPU.  Every request is noted in the page until it is answered (struct
 * pager_notes).  So no request is answered twice, and none is lost when the pager dies, at whatever
 * instruction.  For this purpose the notes are written in this order:
 *
 *   taking     the request as OPEN; then req_cons.  If the pager is killed in between, the request
 *              is taken again.
 *   answering  the request as ANSWERED, with the number of its response; then the response; then
 *              rsp_prod, which informs Xen; then the request as FREE.  If the pager is killed in
 *              between, rsp_prod shows whether the request was answered.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>
#include "vm_event.h"
#include "ring_api.h"

#define STORE(to, value) __atomic_store_n(&(to), value, __ATOMIC_SEQ_CST)

void ring_begin(struct ring_state *ring, uint32_t channel)
{
    struct vm_event_sring *sring = ring->page;
    struct pager_notes *notes = pager_notes(ring->page);

    /* SHARED_RING_INIT: Xen leaves it to us, and the page may be that of an earlier ring. */
    memset(ring->page, 0, 4096);
    sring->req_event = sring->rsp_event = 1;
    ring->req_cons = ring->rsp_prod = 0;
    notes->channel = channel;
    STORE(notes->magic, PAGER_NOTES_MAGIC);
}

static int notify(const struct ring_state *ring)
{
    const uint64_t one = 1;

    return ring->notify_fd >= 0 && write(ring->notify_fd, &one, sizeof(one)) < 0 ? -errno : 0;
}

int ring_resume(struct ring_state *ring, struct ring_request *out)
{
    struct pager_notes *notes = pager_notes(ring->page);
    int n = 0, rc;

    if (notes->magic != PAGER_NOTES_MAGIC)
        return -EPROTO;
    rc = notify(ring);      /* the dead pager may have put responses in without an event */
    if (rc)
        return rc;
    ring->req_cons = notes->req_cons;
    ring->rsp_prod = ((struct vm_event_sring *)ring->page)->rsp_prod;
    for (int i = 0; i < VM_EVENT_SLOTS; i++) {
        typeof(notes->request[0]) *r = &notes->request[i];

        if (r->state == REQUEST_ANSWERED && (int32_t)(ring->rsp_prod - r->number) <= 0)
            STORE(r->state, REQUEST_OPEN);          /* Xen has not received the response */
        else if (r->state == REQUEST_ANSWERED)
            STORE(r->state, REQUEST_FREE);
        else if (r->state == REQUEST_OPEN && (int32_t)(r->number - ring->req_cons) >= 0)
            STORE(r->state, REQUEST_FREE);          /* the request is still in the ring */
        if (r->state == REQUEST_OPEN)
            out[n++] = (struct ring_request){ .gfn = r->gfn, .vcpu_id = r->vcpu_id,
                                              .flags = r->flags, .paging_flags = r->paging_flags,
                                              .p2mt = r->p2mt };
    }
    return n;
}

static int note_request(struct pager_notes *notes, uint32_t number,
                        const struct ring_request *request)
{
    for (int i = 0; i < VM_EVENT_SLOTS; i++)
        if (notes->request[i].state == REQUEST_FREE) {
            notes->request[i].number = number;
            notes->request[i].gfn = request->gfn;
            notes->request[i].vcpu_id = request->vcpu_id;
            notes->request[i].flags = request->flags;
            notes->request[i].paging_flags = request->paging_flags;
            notes->request[i].p2mt = request->p2mt;
            STORE(notes->request[i].state, REQUEST_OPEN);
            STORE(notes->req_cons, number + 1);
            return 0;
        }
    return -EPROTO;     /* more requests than slots */
}

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

            if (n == VM_EVENT_SLOTS)
                return -EPROTO;     /* req_prod is less than what has been taken out */
            if (req->version != VM_EVENT_INTERFACE_VERSION ||
                req->reason != VM_EVENT_REASON_MEM_PAGING)
                return -EPROTO;
            out[n] = (struct ring_request){
                .gfn = req->gfn,
                .vcpu_id = req->vcpu_id,
                .flags = req->flags,
                .paging_flags = req->paging_flags,
                .p2mt = req->p2mt,
            };
            if (note_request(pager_notes(sring), ring->req_cons, &out[n]))
                return -EPROTO;
            n++;
            ring->req_cons++;
        }
        /* Request an event for the next request, then read req_prod once more: Xen may have put a
         * request in between, with the old req_event and without an event. */
        STORE(sring->req_event, ring->req_cons + 1);
        if (__atomic_load_n(&sring->req_prod, __ATOMIC_SEQ_CST) == ring->req_cons ||
            n == VM_EVENT_SLOTS)
            return n;
    }
}

/* Find the note of the open request that this answer is for.  Two answers of one batch never get
 * the same note.  Returns its index, or -1. */
static int find_request(const struct pager_notes *notes, const struct ring_request *answer,
                        uint32_t taken)
{
    for (int i = 0; i < VM_EVENT_SLOTS; i++)
        if (!(taken & 1u << i) && notes->request[i].state == REQUEST_OPEN &&
            notes->request[i].gfn == answer->gfn &&
            notes->request[i].vcpu_id == answer->vcpu_id &&
            notes->request[i].paging_flags == answer->paging_flags)
            return i;
    return -1;
}

int ring_respond(struct ring_state *ring, const struct ring_request *answered, int n)
{
    struct vm_event_sring *sring = ring->page;
    struct pager_notes *notes = pager_notes(ring->page);
    uint32_t taken = 0;
    int at[VM_EVENT_SLOTS];

    if (n < 0 || n > VM_EVENT_SLOTS)
        return -EINVAL;
    for (int i = 0; i < n; i++) {
        at[i] = find_request(notes, &answered[i], taken);
        if (at[i] < 0)
            return -EINVAL;
        taken |= 1u << at[i];
    }
    for (int i = 0; i < n; i++) {
        struct vm_event *rsp = vm_event_slot(sring, ring->rsp_prod + i);

        STORE(notes->request[at[i]].number, ring->rsp_prod + i);
        STORE(notes->request[at[i]].state, REQUEST_ANSWERED);
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
    STORE(sring->rsp_prod, ring->rsp_prod);
    for (int i = 0; i < n; i++)
        STORE(notes->request[at[i]].state, REQUEST_FREE);
    return notify(ring);
}
