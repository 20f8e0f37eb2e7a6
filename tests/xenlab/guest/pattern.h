/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a guest of the lab does with its memory: it fills pages with a known pattern, continues to
 * write them, and checks all that it reads.  A word of a page depends on the page's number and
 * on how often the page was written.  The counts of writes are kept in pages of their own, so that
 * a page with old contents, zeros or the contents of another page is noticed.
 */
#include <stdint.h>

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(uint64_t))

struct memory {
    uint64_t *words;
    uint32_t *writes;   /* the number of writes of each page */
    uint64_t pages;
    unsigned used;      /* words of a page that a step reads and writes */
    uint64_t steps, errors;
    uint64_t wrong_at, wrong;   /* of the first error: which word, and what it was */
};

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

static uint64_t word(uint64_t page, uint32_t writes, unsigned i)
{
    return mix(page << 40 | (uint64_t)writes << 9 | i);
}

static void fill(const struct memory *memory, uint64_t from)
{
    for (uint64_t page = from; page < memory->pages; page++) {
        memory->writes[page] = 0;
        for (unsigned i = 0; i < WORDS; i++)
            memory->words[page * WORDS + i] = word(page, 0, i);
    }
}

/* Reads a page, and writes it in three of four steps.  Returns 1 at the first error. */
static int step(struct memory *memory)
{
    uint64_t order = memory->steps++, page = memory->pages ? mix(order) % memory->pages : 0;
    uint64_t *at = memory->words + page * WORDS;
    int first = 0;

    for (unsigned i = 0; i < memory->used; i++)
        if (at[i] != word(page, memory->writes[page], i)) {
            first = !memory->errors++;
            if (first) {
                memory->wrong_at = page * WORDS + i;
                memory->wrong = at[i];
            }
            break;
        }
    if (order % 4 != 3) {
        memory->writes[page]++;
        for (unsigned i = 0; i < memory->used; i++)
            at[i] = word(page, memory->writes[page], i);
    }
    return first;
}
