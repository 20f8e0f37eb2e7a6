/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * zlib's CRC-32, of a frame's header and, if the ends have agreed on it, of the page behind it.
 *
 * A page is folded by carry-less multiplication, which nearly every x86 CPU has since 2010.  The
 * method and its constants, powers of x modulo the polynomial, are in Intel's "Fast CRC Computation
 * for Generic Polynomials Using PCLMULQDQ Instruction" (2009).
 */
#include "internal.h"

#define LEAST_TO_FOLD 64

/* By half bytes: a table of 1 KiB would not be in the cache when a fault arrives. */
static uint32_t add_bytes(uint32_t sum, const uint8_t *bytes, size_t n)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4,
        0x4db26158, 0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
        0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };

    for (size_t i = 0; i < n; i++) {
        sum ^= bytes[i];
        sum = sum >> 4 ^ table[sum & 15];
        sum = sum >> 4 ^ table[sum & 15];
    }
    return sum;
}

#ifdef __x86_64__
#include <immintrin.h>

#define FOR_FOLDING __attribute__((target("pclmul")))

static inline __m128i load_block(const uint8_t *bytes)
{
    return _mm_loadu_si128((const __m128i *)bytes);
}

/* Move the remainder in x forward by the distance of the powers, and add what is there. */
FOR_FOLDING static inline __m128i fold(__m128i x, __m128i powers, __m128i there)
{
    __m128i low = _mm_clmulepi64_si128(x, powers, 0x00);
    __m128i high = _mm_clmulepi64_si128(x, powers, 0x11);

    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

/* Fold all whole blocks of 16 bytes, of which there are at least four, into one that has the same
 * sum if it is added to a sum of 0. */
FOR_FOLDING static void fold_blocks(uint32_t sum, const uint8_t *bytes, size_t n, uint8_t left[16])
{
    const __m128i by_512_bits = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
    const __m128i by_128_bits = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i x[4];

    for (int i = 0; i < 4; i++)
        x[i] = load_block(bytes + 16 * i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(sum));
    for (bytes += 64, n -= 64; n >= 64; bytes += 64, n -= 64)
        for (int i = 0; i < 4; i++)
            x[i] = fold(x[i], by_512_bits, load_block(bytes + 16 * i));
    for (int i = 1; i < 4; i++)
        x[0] = fold(x[0], by_128_bits, x[i]);
    for (; n >= 16; bytes += 16, n -= 16)
        x[0] = fold(x[0], by_128_bits, load_block(bytes));
    _mm_storeu_si128((__m128i *)left, x[0]);
}

static uint32_t add_to_sum(uint32_t sum, const uint8_t *bytes, size_t n)
{
    uint8_t left[16];

    if (n < LEAST_TO_FOLD || !__builtin_cpu_supports("pclmul"))
        return add_bytes(sum, bytes, n);
    fold_blocks(sum, bytes, n, left);
    return add_bytes(add_bytes(0, left, sizeof(left)), bytes + n / 16 * 16, n % 16);
}
#else
static uint32_t add_to_sum(uint32_t sum, const uint8_t *bytes, size_t n)
{
    return add_bytes(sum, bytes, n);
}
#endif

uint32_t fault_checksum(uint32_t before, const uint8_t *bytes, size_t n)
{
    return ~add_to_sum(~before, bytes, n);
}
