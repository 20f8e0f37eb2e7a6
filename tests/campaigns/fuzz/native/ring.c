/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The pager's end of the ring (xenbackend/native/ring.c) on a page with any contents: what a
 * hypervisor or a predecessor that went wrong may leave there.
 */
#include <errno.h>
#include "input.h"
#include "ring_api.h"
#include "vm_event.h"

#define RESUME 1
#define BEGIN 4
/* Requests and notes as a working front end makes them; the indices are still from the input. */
#define SANE 2

static void make_sane(uint8_t *page)
{
    struct vm_event_sring *sring = (void *)page;

    for (unsigned i = 0; i < VM_EVENT_SLOTS; i++) {
        sring->slot[i].version = VM_EVENT_INTERFACE_VERSION;
        sring->slot[i].reason = VM_EVENT_REASON_MEM_PAGING;
        pager_notes(page)->request[i].state %= 3;
    }
    pager_notes(page)->magic = PAGER_NOTES_MAGIC;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *page = exactly(4096);
    struct ring_request *out = exactly(VM_EVENT_SLOTS * sizeof(*out));
    struct vm_event_sring *sring = (void *)page;
    struct ring_state ring = { .page = page, .event_fd = -1, .notify_fd = -1 };
    uint8_t flags;

    input = data;
    input_left = size;
    flags = take_byte();
    ring.req_cons = take_u32();
    ring.rsp_prod = take_u32();
    if (flags & BEGIN)
        ring_begin(&ring, 1);
    for (int round = 0; round < 4; round++) {
        struct {
            uint16_t at;
            uint8_t n;
        } piece;
        int n;

        sring->req_prod = take_u32();
        /* Write some bytes anywhere in the page. */
        for (int left = take_byte() % 8; left; left--) {
            piece.at = take_u32() % 4096;
            piece.n = take_byte();
            take_bytes(page + piece.at, piece.at + piece.n <= 4096 ? piece.n : 4096 - piece.at);
        }
        if (flags & SANE)
            make_sane(page);
        if (flags & RESUME && !round) {
            n = ring_resume(&ring, out);
            CHECK(n <= VM_EVENT_SLOTS);
        }
        n = ring_consume(&ring, out);
        CHECK(n <= VM_EVENT_SLOTS && (n >= 0 || n == -EPROTO));
        if (n > 0) {
            struct ring_request answers[VM_EVENT_SLOTS + 1]; /* one more than can be open */
            int answered = take_byte() % (n + 2), rc;

            memcpy(answers, out, n * sizeof(*out));
            answers[n] = out[0];
            rc = ring_respond(&ring, answers, answered);
            CHECK(rc == -EINVAL || (rc == 0 && answered <= VM_EVENT_SLOTS));
        }
    }
    free(out);
    free(page);
    return 0;
}
