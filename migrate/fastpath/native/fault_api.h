/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What Python sees of the fast path, besides the states of pages (cffi reads this file as well). */

/* ---- locks that both languages take; waiting for one does not hold the interpreter lock ---- */
struct fault_lock *fault_lock_new(void);            /* NULL: no memory */
void fault_lock_free(struct fault_lock *lock);
void fault_lock_take(struct fault_lock *lock);
void fault_lock_give(struct fault_lock *lock);
int fault_lock_is_taken(struct fault_lock *lock);

/* ---- frames about one page ---- */

/* zlib's CRC-32 of some bytes and of those before them, whose sum is 0 if there are none. */
uint32_t fault_checksum(uint32_t before, const uint8_t *bytes, size_t n);

/* A kind of frames as the codec makes them.  Frames of different pages differ in the eight bytes at
 * pfn_at and in the checksums. */
struct fault_frame {
    uint8_t bytes[96];
    uint32_t size;
    uint32_t pfn_at;
    int covers_page;        /* the checksum of the header covers the page behind the frame */
};

/* The pfn of a whole frame of this kind, or -1 if it is no such frame.  If the kind covers a page,
 * ask fault_frame_is_whole() when the page has arrived. */
int64_t fault_frame_pfn(const struct fault_frame *kind, const uint8_t *frame);
int fault_frame_is_whole(const struct fault_frame *kind, const uint8_t *frame, const void *page);
void fault_frame_make(const struct fault_frame *kind, uint64_t pfn, const void *page,
                      uint8_t *frame);

/* A TLS connection, and a piece of memory to send. */
struct records;
struct iovec;

/* The lane, and the frames that go over it. */
struct fault_lane {
    int fd;
    struct records *records;    /* or NULL: frames go through the socket unchanged */
    /* as migrate/lanes/native/records_api.h */
    int (*records_send)(struct records *records, const struct iovec *pieces, size_t n);
    long (*records_receive)(struct records *records, void *into, size_t bytes, int flags);
    int (*records_are_buffered)(struct records *records);
    int open;               /* faults are allowed; until then the slow path refuses them */
    struct fault_lock *sending;
    struct fault_frame fault, page, zero;
    uint64_t sent;          /* bytes, since Python read this */
    int error;              /* errno of a send that failed */
};

/* Open the lane, when all other fields have been set.  Another thread may be waiting for it. */
void fault_lane_open(struct fault_lane *lane);

/* ---- the sender ---- */
struct fault_source {
    struct fault_lane lane;
    void *domain;           /* the first argument of look and looked */
    int (*look)(void *domain, uint64_t pfn, const void **page);     /* a PageStatus */
    void (*looked)(void *domain, const void *page);                 /* or NULL */
    struct source_pages *pages;
    uint64_t nr_sent, nr_zeros;     /* pages that were sent since Python read this */
};

/*
 * Receive into a buffer and answer faults, until something else arrives or, unless wait is set,
 * until nothing has arrived.  Returns the number of bytes in the buffer that are not handled, 0 at
 * the connection's end, or -errno.
 */
long fault_serve(struct fault_source *s, void *buffer, size_t size, int wait);

/* ---- the receiver ---- */
enum { FAULT_STOPPED = 1, FAULT_RING = 2, FAULT_ASKED = 4, FAULT_LANE = 8, FAULT_LOADED = 16 };

struct fault_pager {
    struct fault_lane lane;
    int wake_fd;
    int ring_fd;
    void *ring;                                     /* as xenbackend/native/ring_api.h */
    int (*consume)(void *ring, struct ring_request *out);
    int (*respond)(void *ring, const struct ring_request *answered, int n);
    void *domain;           /* the first argument of load */
    int (*load)(void *domain, uint64_t pfn, const void *page);      /* NULL: zeros.  0, or -errno */
    struct destination_pages *pages;
    struct page_actions actions;    /* of the last step */
    /* Of the last call: */
    struct ring_request requests[FAULT_SLOTS];      /* FAULT_RING: the caller handles these */
    int nr_requests;        /* or -errno */
    long received;          /* FAULT_LANE: as fault_serve's */
    uint64_t finished[FAULT_SLOTS];                 /* pages that are READY or DROPPED now */
    int32_t results[FAULT_SLOTS];                   /* 0 or -ENOENT */
    uint32_t nr_finished;
    struct waiting_request answered[FAULT_SLOTS];
    uint32_t nr_answered;
};

/*
 * Wait for an event and handle it.  Returns -errno, or the events:
 *   FAULT_STOPPED  wake_fd is readable
 *   FAULT_ASKED    requests have been handled (actions)
 *   FAULT_RING     requests before the lane is open, or an error of the ring (nr_requests)
 *   FAULT_LOADED   pages have been loaded
 *   FAULT_LANE     something else has arrived on the lane (received)
 */
int fault_wait(struct fault_pager *p, void *buffer, size_t size);
