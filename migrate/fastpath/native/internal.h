/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The fast path of a fault: the steps of nearly every fault, at both ends, without Python.
 *
 *   receiver   ring -> a page that is outstanding -> "fault" on the pull lane     destination.c
 *   sender     "fault" on the pull lane -> the page, without a copy               source.c
 *   receiver   "pages" on the pull lane -> load -> answer in the ring             destination.c
 *
 * A vCPU is stopped during these steps.  The caches are cold, so Python code that takes 8 us in a
 * loop takes 45 us if it runs once every millisecond.  So Python does its accounting afterwards,
 * when the request or the answer has been sent.
 *
 * The slow path, in Python, handles every other case: a frame that is not, byte for byte, one about
 * one page as our own codec makes it; several pages in one message; pages that were never missing;
 * and errors.  A call that receives such a message returns the message unchanged, so this code
 * contains no msgpack.  Both paths do the same steps from one state of a page to the next
 * (page_states.h).
 */
#ifndef XEN_POSTCOPY_FASTPATH_INTERNAL_H
#define XEN_POSTCOPY_FASTPATH_INTERNAL_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
#include "ring_api.h"
#include "page_states.h"
#include "fault_api.h"

#define PAGE_BYTES 4096

/* ---- frame.c: the layout of a frame's prefix (migrate/protocol/frames.py) ---- */
#define HEADER_SUM_AT 12
#define PREFIX_SUM_AT 16
#define HEADER_AT 20

/* ---- lane.c ---- */
int lane_is_open(const struct fault_lane *lane);

/* Receive some bytes.  Returns their number, 0 at the connection's end, or -errno. */
long lane_receive(const struct fault_lane *lane, void *buffer, size_t size, int flags);

/* Receive until *got is end.  Returns 0 if the connection ends earlier. */
int lane_receive_up_to(const struct fault_lane *lane, uint8_t *buffer, long *got, long end);

/* Whether bytes can be received although the socket may not be readable. */
int lane_is_buffered(const struct fault_lane *lane);

/* Send all of the vector.  Returns 0, or -1 with lane->error set. */
int lane_send(struct fault_lane *lane, struct iovec *vector, size_t n);

#endif
