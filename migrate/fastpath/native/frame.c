/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Frames about one page, as the codec makes them (migrate/protocol/frames.py). */
#include <string.h>
#include "internal.h"

static void put_be32(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = value >> (24 - 8 * i);
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

/* The checksum of the header, and of the page behind it if the kind says so. */
static uint32_t header_sum(const struct fault_frame *kind, const uint8_t *frame, const void *page)
{
    uint32_t sum = fault_checksum(0, frame + HEADER_AT, kind->size - HEADER_AT);

    return kind->covers_page ? fault_checksum(sum, page, PAGE_BYTES) : sum;
}

int64_t fault_frame_pfn(const struct fault_frame *kind, const uint8_t *frame)
{
    uint32_t behind = kind->pfn_at + 8;
    uint64_t pfn = 0;

    if (memcmp(frame, kind->bytes, HEADER_SUM_AT) ||
        memcmp(frame + HEADER_AT, kind->bytes + HEADER_AT, kind->pfn_at - HEADER_AT) ||
        memcmp(frame + behind, kind->bytes + behind, kind->size - behind) ||
        be32(frame + PREFIX_SUM_AT) != fault_checksum(0, frame, PREFIX_SUM_AT) ||
        (!kind->covers_page && !fault_frame_is_whole(kind, frame, NULL)))
        return -1;
    for (int i = 7; i >= 0; i--)
        pfn = pfn << 8 | frame[kind->pfn_at + i];
    return pfn > INT64_MAX ? -1 : (int64_t)pfn;
}

int fault_frame_is_whole(const struct fault_frame *kind, const uint8_t *frame, const void *page)
{
    return be32(frame + HEADER_SUM_AT) == header_sum(kind, frame, page);
}

void fault_frame_make(const struct fault_frame *kind, uint64_t pfn, const void *page,
                      uint8_t *frame)
{
    memcpy(frame, kind->bytes, kind->size);
    for (int i = 0; i < 8; i++)
        frame[kind->pfn_at + i] = pfn >> 8 * i;
    put_be32(frame + HEADER_SUM_AT, header_sum(kind, frame, page));
    put_be32(frame + PREFIX_SUM_AT, fault_checksum(0, frame, PREFIX_SUM_AT));
}
