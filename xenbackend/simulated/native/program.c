/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guest programs, and what a guest's memory must hold after any number of their steps.
 *
 * Access k of vCPU v is a pure function of (seed, v, k), and the history of each page is a closed
 * form of these.  Nothing is recorded, so a migration cannot lose a record that a check needs to
 * find an error.
 *
 * Each program is a set of *streams*.  A stream walks over its pages pass by pass, and each pass is
 * a permutation of the pages, so visit number j of a page is in pass j.  At access k a vCPU
 * therefore computes how often it has visited that page and what it wrote there last, and checks
 * the page.
 *
 *   random      one stream, a new pseudo-random order each pass
 *   sequential  one stream in order; the vCPUs start at different places
 *   stride      one stream: 0, s, 2s, ..., 1, s + 1, ...
 *   hotset      Zipf(1): the ranks [2^l, 2^(l+1)) all have about the same weight for every l,
 *               so level l is a stream of 2^l pages and each stream gets every L-th access
 *
 * The words of a page are divided among the vCPUs (word w belongs to vCPU w mod nr_vcpus), so
 * writers never race for a word, and each vCPU writes its words of a page in turn.  Before a write
 * the vCPU checks the word that it wrote last in that page.
 *
 * The balloon is a count of steps.  With balloon_back, 2 * balloon_pages of them give all pages
 * away and take them back, the last one first.  A page that was taken back is filled with values of
 * its own.
 */
#include <string.h>
#include "internal.h"

#define WORDS (PAGE_BYTES / 8)

static inline uint64_t mix64(uint64_t x)      /* the finaliser of splitmix64 */
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* The guest's pages are numbered without the hole for devices. */
uint64_t sim_pfn(const struct sim_program *p, uint64_t page)
{
    return page < p->hole_at ? page : page + p->hole_pfns;
}

/* A keyed permutation of [0, n): a Feistel network over the next even power of two, repeated until
 * the result is less than n. */
static uint64_t permute(uint64_t i, uint64_t n, uint64_t key)
{
    unsigned half;
    uint64_t mask;

    if (n < 2)
        return 0;
    half = (64 - __builtin_clzll(n - 1) + 1) / 2;
    mask = (1ull << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;

        for (unsigned round = 0; round < 3; round++) {
            uint64_t f = (right + key + round) * 0x9e3779b97f4a7c15ull;
            uint64_t next = left ^ ((f ^ (f >> 29)) * 0xbf58476d1ce4e5b9ull >> 32 & mask);

            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

static uint32_t nr_streams(const struct sim_program *p)
{
    return p->kind == PROGRAM_HOTSET ? 64 - __builtin_clzll(p->pages) : 1;
}

static uint64_t stream_pages(const struct sim_program *p, uint32_t stream)
{
    uint64_t first = (1ull << stream) - 1;

    if (p->kind != PROGRAM_HOTSET)
        return p->pages;
    return (1ull << stream) < p->pages - first ? (1ull << stream) : p->pages - first;
}

/* The page at place i of the given pass of a stream. */
static uint64_t place(const struct sim_program *p, uint32_t vcpu, uint32_t stream, uint64_t pass,
                      uint64_t i)
{
    uint64_t n = stream_pages(p, stream);

    switch (p->kind) {
    case PROGRAM_SEQUENTIAL:
        i += n / p->nr_vcpus * vcpu;
        return i < n ? i : i - n;
    case PROGRAM_STRIDE: {
        uint64_t rows = n / p->stride, longer = n % p->stride, cut = longer * (rows + 1);

        if (i < cut)
            return i / (rows + 1) + i % (rows + 1) * p->stride;
        i -= cut;
        return longer + i / rows + i % rows * p->stride;
    }
    case PROGRAM_HOTSET:
        i = permute(i, n,
                    mix64(p->seed ^ ((uint64_t)vcpu << 48) ^ ((uint64_t)stream << 40) ^ pass));
        return permute((1ull << stream) - 1 + i, p->pages, p->seed);
    default:
        return permute(i, n, mix64(p->seed ^ ((uint64_t)vcpu << 48) ^ pass));
    }
}

struct sim_access sim_access_at(const struct sim_program *p, uint32_t vcpu, uint64_t k)
{
    uint32_t streams = nr_streams(p), stream = k % streams;
    uint64_t n = stream_pages(p, stream), step = k / streams;

    return (struct sim_access){ place(p, vcpu, stream, step / n, step % n), step / n };
}

/* The number of writes in the first `visits` visits: the share write_permille, spread evenly. */
uint64_t sim_writes(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t visits)
{
    return (visits * p->write_permille + mix64(p->seed + page * 64 + vcpu) % 1000) / 1000;
}

uint32_t sim_word(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t write)
{
    uint32_t own = WORDS / p->nr_vcpus;

    return vcpu + p->nr_vcpus * ((mix64(page ^ p->seed) + write) % own);
}

uint64_t sim_value(const struct sim_program *p, uint32_t vcpu, uint64_t page, uint64_t write)
{
    return mix64(mix64(p->seed + page * 64 + vcpu) + write);
}

/* A word of what the guest writes into a page that its balloon took back for the n-th time. */
uint64_t sim_taken_word(const struct sim_program *p, uint64_t page, uint64_t taken, uint32_t word)
{
    return mix64(mix64(p->seed ^ page << 16 ^ taken) + word);
}

uint64_t sim_image_word(const struct sim_program *p, uint64_t page, uint32_t word)
{
    if (mix64(p->image_seed ^ page) % 1000 < p->zero_permille)
        return 0;
    return mix64(p->image_seed + page * WORDS + word);
}

static int image_page(const struct sim_program *p, uint64_t page, uint64_t *words)
{
    if (mix64(p->image_seed ^ page) % 1000 < p->zero_permille)
        return 0;
    for (uint32_t w = 0; w < WORDS; w++)
        words[w] = mix64(p->image_seed + page * WORDS + w);
    return 1;
}

void sim_image_pages(const struct sim_program *p, uint64_t from, uint64_t n, uint8_t *pages)
{
    for (uint64_t i = 0; i < n; i++)
        if (!image_page(p, from + i, (uint64_t *)(pages + i * PAGE_BYTES)))
            memset(pages + i * PAGE_BYTES, 0, PAGE_BYTES);
}

void sim_generate_image(struct sim_map *m, uint64_t from, uint64_t n)
{
    for (uint64_t page = from; page < from + n; page++) {
        uint64_t pfn = sim_pfn(&m->dom->program, page);

        if (image_page(&m->dom->program, page, (uint64_t *)(m->memory + pfn * PAGE_BYTES)))
            __atomic_fetch_or(&m->p2m[pfn], E_TOUCHED, __ATOMIC_SEQ_CST);
    }
}

/* Compute visits[page] for all pages of the working set after `count` accesses of a vCPU. */
void sim_expected_visits(const struct sim_program *p, uint32_t vcpu, uint64_t count,
                         uint64_t *visits)
{
    uint32_t streams = nr_streams(p);

    for (uint32_t s = 0; s < streams; s++) {
        uint64_t n = stream_pages(p, s);
        uint64_t steps = (count + streams - 1 - s) / streams;
        /* analyser: n is not 0, each of nr_streams() has a page */
        uint64_t passes = steps / n, rest = steps % n;

        for (uint64_t i = 0; i < n; i++)
            visits[place(p, vcpu, s, passes, i)] = passes + (i < rest);
    }
}

/* Write into `words`, which hold the image's page, what the vCPUs have written there. */
static void overlay(const struct sim_program *p, uint64_t page, const uint64_t *visits,
                    uint64_t *words)
{
    uint64_t own = WORDS / p->nr_vcpus;

    for (uint32_t v = 0; v < p->nr_vcpus; v++) {
        uint64_t n = sim_writes(p, v, page, visits[v * p->pages + page]);

        for (uint64_t w = n > own ? n - own : 0; w < n; w++)
            words[sim_word(p, v, page, w)] = sim_value(p, v, page, w);
    }
}

/* pages[] holds the image's pages [from, from + n), and on return what the guest must have there.
 * differs[i] becomes 1 if actual[] differs from that.  taken[i]: how often the balloon took the
 * page back. */
void sim_compare_pages(const struct sim_program *p, uint64_t from, uint64_t n,
                       const uint64_t *visits, const uint64_t *taken, uint8_t *pages,
                       const uint8_t *actual, uint8_t *differs)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t *page = (uint64_t *)(pages + i * PAGE_BYTES);

        if (from + i < p->pages)
            overlay(p, from + i, visits, page);
        for (uint32_t w = 0; taken[i] && w < WORDS; w++)
            page[w] = sim_taken_word(p, from + i, taken[i], w);
        differs[i] = memcmp(pages + i * PAGE_BYTES, actual + i * PAGE_BYTES, PAGE_BYTES) != 0;
    }
}

/* vCPU 0 gives pages away from the top, below the vcpu_info frames. */
uint64_t sim_balloon_page(const struct sim_program *p, uint64_t nr_pfns, uint64_t number)
{
    return nr_pfns - p->hole_pfns - 1 - p->nr_vcpus - number;
}

/* The number of steps of the balloon that are due after so many accesses of vCPU 0. */
uint64_t sim_balloon_due(const struct sim_program *p, uint64_t count)
{
    uint64_t n = p->balloon_every && p->balloon_pages ? count / p->balloon_every : 0;

    return p->balloon_back || n < p->balloon_pages ? n : p->balloon_pages;
}

/* Returns whether this step gives a page away (otherwise it takes one back), and which page. */
int sim_balloon_gives(const struct sim_program *p, uint64_t step, uint64_t *number)
{
    uint64_t of_both = step % (2 * p->balloon_pages);

    *number = of_both < p->balloon_pages ? of_both : 2 * p->balloon_pages - 1 - of_both;
    return of_both < p->balloon_pages;
}

/* How often the first steps have given a page away, and taken it back. */
uint64_t sim_balloon_given(const struct sim_program *p, uint64_t steps, uint64_t number)
{
    return steps / (2 * p->balloon_pages) + (number < steps % (2 * p->balloon_pages));
}

uint64_t sim_balloon_taken(const struct sim_program *p, uint64_t steps, uint64_t number)
{
    return steps / (2 * p->balloon_pages) +
           (number >= 2 * p->balloon_pages - steps % (2 * p->balloon_pages));
}
