/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What Python sees of ring.c (this file is read by cffi as well). */

struct ring_request {
    uint64_t gfn;
    uint32_t vcpu_id;
    uint32_t flags;          /* VM_EVENT_FLAG_* */
    uint32_t paging_flags;   /* MEM_PAGING_* */
    uint32_t p2mt;
};

struct ring_state {
    void *page;
    uint32_t req_cons;       /* requests taken out */
    uint32_t rsp_prod;       /* responses put in */
    int event_fd;            /* eventfds, or -1 if the event channel is of another kind: */
    int notify_fd;           /* consumed before requests are taken, written after responses */
};

/* Begin a ring that was just enabled, as its first pager.  channel: what a successor needs of the
 * event channel. */
void ring_begin(struct ring_state *ring, uint32_t channel);

/* Continue as the successor of a pager that has died.  Puts the open requests into out (up to 8).
 * Returns their number, or -EPROTO if no pager of ours has begun this ring. */
int ring_resume(struct ring_state *ring, struct ring_request *out);

/* Take out up to 8 requests.  Returns their number; or -EPROTO for a corrupt ring, for another
 * interface version, and for an event that is not about paging. */
int ring_consume(struct ring_state *ring, struct ring_request *out);

/* Answer n requests.  Returns 0, or -EINVAL if one of the answers is to no open request; the ring
 * is not changed then. */
int ring_respond(struct ring_state *ring, const struct ring_request *answered, int n);
