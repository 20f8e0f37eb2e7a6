/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What Python sees of fault.c (this file is read by cffi as well). */

/* ---- locks that both languages take: waited for without the interpreter lock ---- */
struct fault_lock;
struct fault_lock *fault_lock_new(void);            /* NULL: no memory */
void fault_lock_free(struct fault_lock *lock);
void fault_lock_take(struct fault_lock *lock);
void fault_lock_give(struct fault_lock *lock);
int fault_lock_is_taken(struct fault_lock *lock);

/* ---- frames about one page ---- */

/* As the codec makes them, for any pfn: eight bytes of it at pfn_at, and the checksums, are another page's. */
struct fault_frame {
    uint8_t bytes[96];
    uint32_t size;
    uint32_t pfn_at;
};

/* pfn of a whole frame of this kind, or -1: it is none. */
int64_t fault_frame_pfn(const struct fault_frame *kind, const uint8_t *frame);
void fault_frame_make(const struct fault_frame *kind, uint64_t pfn, uint8_t *frame);

/* Frames of which are read and answered, and the lane that they go over. */
struct fault_lane {
    int fd;
    int open;               /* faults are in order; until then whatever comes goes the general way, which refuses it */
    struct fault_lock *sending;
    struct fault_frame fault, page, zero;
    uint64_t sent;          /* bytes, since somebody has looked */
    int error;              /* errno of a send that failed */
};

/* After all else has been set; also while a thread waits for what comes. */
void fault_lane_open(struct fault_lane *lane);

/* ---- the sender ---- */
struct fault_source {
    struct fault_lane lane;
    void *domain;           /* what look wants */
    int (*look)(void *domain, uint64_t pfn, const void **page);     /* a PageStatus */
    void (*looked)(void *domain, const void *page);                 /* or NULL */
    struct fault_lock *lock;                        /* of what follows: struct Backlog's */
    uint8_t *state;
    uint64_t nr_pfns;
    int64_t *left;
    int64_t *unsent;
    int64_t *cursor;
    uint64_t pages, zeros;  /* that were sent, since somebody has looked */
};

/*
 * Receive into a buffer and answer faults, as long as nothing else comes, or if not to wait there are any.  Returns the number of bytes
 * that are in the buffer and not dealt with, 0 at the connection's end, or -errno.
 */
long fault_serve(struct fault_source *s, void *buffer, size_t size, int wait);

/* ---- the receiver ---- */
enum { FAULT_STOPPED = 1, FAULT_RING = 2, FAULT_ASKED = 4, FAULT_LANE = 8, FAULT_LOADED = 16 };

#define FAULT_SLOTS 8

struct fault_waiting {
    struct ring_request request;
    uint64_t since_ns;
    uint64_t until_ns;
};

struct fault_pager {
    struct fault_lane lane;
    int wake_fd;
    int ring_fd;
    void *ring;                                     /* as xenbackend/native/ring_api.h */
    int (*consume)(void *ring, struct ring_request *out);
    int (*respond)(void *ring, const struct ring_request *answered, int n);
    void *domain;           /* what load wants */
    int (*load)(void *domain, uint64_t pfn, const void *page);      /* NULL: zeros.  0, or -errno */
    struct fault_lock *lock;                        /* of what follows: the pager's */
    uint8_t *state;         /* OutstandingPages' */
    uint64_t nr_pfns;
    struct fault_waiting waiting[FAULT_SLOTS];
    uint32_t nr_waiting;
    struct fault_waiting answered[4 * FAULT_SLOTS]; /* since somebody has looked */
    uint32_t nr_answered;
    /* What the last call has met with: */
    struct ring_request requests[FAULT_SLOTS];      /* FAULT_RING: for the caller to deal with; FAULT_ASKED: dealt with */
    int nr_requests;        /* or -errno */
    uint32_t asked;         /* pages */
    long received;          /* FAULT_LANE: as fault_serve's */
    uint64_t loaded[FAULT_SLOTS];
    int32_t results[FAULT_SLOTS];
    uint32_t nr_loaded;
};

/* Wait for something, deal with it where it is the usual, and say what it was (FAULT_*, or -errno). */
int fault_wait(struct fault_pager *p, void *buffer, size_t size);

/* Under the lock, when pages are READY or DROPPED: answer who waits for them.  Returns 0 or -errno. */
int fault_answer(struct fault_pager *p);
