/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Frames about one page, as the codec makes them (migrate/protocol/frames.py). */
#include <string.h>
#include "internal.h"

/* zlib's CRC-32, by half bytes: a table of 1 KiB would not be in the cache when a fault arrives. */
static uint32_t crc32(const uint8_t *bytes, size_t n)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
        0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
        0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    uint32_t sum = ~0u;

    for (size_t i = 0; i < n; i++) {
        sum ^= bytes[i];
        sum = sum >> 4 ^ table[sum & 15];
        sum = sum >> 4 ^ table[sum & 15];
    }
    return ~sum;
}

static void put_be32(uint8_t *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = value >> (24 - 8 * i);
}

static uint32_t be32(const uint8_t *at)
{
    return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

int64_t fault_frame_pfn(const struct fault_frame *kind, const uint8_t *frame)
{
    uint32_t behind = kind->pfn_at + 8;
    uint64_t pfn = 0;

    if (memcmp(frame, kind->bytes, HEADER_SUM_AT) ||
        memcmp(frame + HEADER_AT, kind->bytes + HEADER_AT, kind->pfn_at - HEADER_AT) ||
        memcmp(frame + behind, kind->bytes + behind, kind->size - behind) ||
        be32(frame + PREFIX_SUM_AT) != crc32(frame, PREFIX_SUM_AT) ||
        be32(frame + HEADER_SUM_AT) != crc32(frame + HEADER_AT, kind->size - HEADER_AT))
        return -1;
    for (int i = 7; i >= 0; i--)
        pfn = pfn << 8 | frame[kind->pfn_at + i];
    return pfn > INT64_MAX ? -1 : (int64_t)pfn;
}

void fault_frame_make(const struct fault_frame *kind, uint64_t pfn, uint8_t *frame)
{
    memcpy(frame, kind->bytes, kind->size);
    for (int i = 0; i < 8; i++)
        frame[kind->pfn_at + i] = pfn >> 8 * i;
    put_be32(frame + HEADER_SUM_AT, crc32(frame + HEADER_AT, kind->size - HEADER_AT));
    put_be32(frame + PREFIX_SUM_AT, crc32(frame, PREFIX_SUM_AT));
}
