/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The paging ring's binary layout, as Xen 4.17 has it.
 *
 * One 4 KiB page is shared between the hypervisor (front end: it requests) and
 * the pager (back end: it answers).  Four free-running 32-bit indices are at
 * its start; the slots follow.  Requests and responses use the same slots:
 * response number r is put where request number r was.  The pager has
 * consumed that request before, so rsp_prod never overtakes req_cons.
 *
 * Sources: xen/include/public/vm_event.h (VM_EVENT_INTERFACE_VERSION 7) and
 * xen/include/public/io/ring.h.
 */
#ifndef XEN_POSTCOPY_VM_EVENT_H
#define XEN_POSTCOPY_VM_EVENT_H

#include <stdint.h>
#include <string.h>

#define VM_EVENT_INTERFACE_VERSION 7
#define VM_EVENT_SIZE 400        /* sizeof(vm_event_request_t) */
#define VM_EVENT_SLOTS 8         /* (4096 - 64) / 400, down to a power of two */
#define VM_EVENT_REASON_MEM_PAGING 3
#define VM_EVENT_FLAG_VCPU_PAUSED 1
#define MEM_PAGING_DROP_PAGE 1
#define MEM_PAGING_EVICT_FAIL 2

struct vm_event {
    uint32_t version;
    uint32_t flags;
    uint32_t reason;
    uint32_t vcpu_id;
    uint16_t altp2m_idx;
    uint16_t pad[3];
    uint64_t gfn;                /* u.mem_paging.gfn */
    uint32_t p2mt;               /* u.mem_paging.p2mt */
    uint32_t paging_flags;       /* u.mem_paging.flags */
    uint8_t rest[VM_EVENT_SIZE - 40];
};

struct vm_event_sring {
    uint32_t req_prod, req_event;
    uint32_t rsp_prod, rsp_event;
    uint8_t pad[48];
    struct vm_event slot[VM_EVENT_SLOTS];
};

_Static_assert(sizeof(struct vm_event) == VM_EVENT_SIZE, "vm_event size");
_Static_assert(__builtin_offsetof(struct vm_event, gfn) == 24, "gfn offset");
_Static_assert(__builtin_offsetof(struct vm_event, p2mt) == 32, "p2mt offset");
_Static_assert(__builtin_offsetof(struct vm_event_sring, slot) == 64, "slot offset");

/*
 * The pager's notes, in the part of the page that neither Xen nor the ring uses: which requests are
 * open.  They are here, and not in the pager's memory, so that a pager that is killed can have a
 * successor.  The slots themselves do not show this: responses are put in another order than
 * requests, and over requests that are still open.
 */
#define PAGER_NOTES_OFFSET 3584
#define PAGER_NOTES_MAGIC 0x58505631u

enum { REQUEST_FREE, REQUEST_OPEN, REQUEST_ANSWERED };

struct pager_notes {
    uint32_t magic;
    uint32_t channel;            /* Xen's end of the event channel */
    uint32_t req_cons;
    uint32_t pad;
    struct {
        uint32_t state;
        uint32_t number;         /* of the request; if ANSWERED, of the response */
        uint64_t gfn;
        uint32_t vcpu_id, flags, paging_flags, p2mt;
    } request[VM_EVENT_SLOTS];
};

_Static_assert(sizeof(struct vm_event_sring) <= PAGER_NOTES_OFFSET,
               "the notes are behind the slots");
_Static_assert(PAGER_NOTES_OFFSET + sizeof(struct pager_notes) <= 4096,
               "the notes are in the page");

static inline struct pager_notes *pager_notes(void *page)
{
    return (struct pager_notes *)((uint8_t *)page + PAGER_NOTES_OFFSET);
}

static inline struct vm_event *vm_event_slot(struct vm_event_sring *ring, uint32_t index)
{
    return &ring->slot[index % VM_EVENT_SLOTS];
}

#endif
