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
    int event_fd;            /* eventfds, or -1 where the event channel is not one: */
    int notify_fd;           /* consumed before requests are taken, written after responses are put */
};

/* Take out up to 8 requests.  Returns how many, -EPROTO for a corrupt ring, a
 * foreign interface version or an event that is not about paging. */
int ring_consume(struct ring_state *ring, struct ring_request *out);

/* Answer n requests.  Returns 0, or -EINVAL where an answer would have no request
 * (more responses than requests: the ring is left as it was). */
int ring_respond(struct ring_state *ring, const struct ring_request *answered, int n);
