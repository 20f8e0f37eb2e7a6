/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A fuzzer's input, taken from its start.  Behind its end there are zeros. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What must hold, whatever the input is.  The fuzzer keeps an input that ends the process. */
#define CHECK(what) ((what) ? (void)0 : abort())

static const uint8_t *input;
static size_t input_left;

static void take_bytes(void *into, size_t n)
{
    size_t there = n < input_left ? n : input_left;

    memset(into, 0, n);
    if (there)
        memcpy(into, input, there);
    input += there;
    input_left -= there;
}

static uint8_t take_byte(void)
{
    uint8_t byte;

    take_bytes(&byte, 1);
    return byte;
}

static inline uint32_t take_u32(void)
{
    uint32_t word;

    take_bytes(&word, 4);
    return word;
}

/* Memory of exactly this size, so that AddressSanitizer finds an access beyond its end. */
static inline void *exactly(size_t bytes)
{
    void *memory = calloc(1, bytes);

    CHECK(memory || !bytes);
    return memory;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
