/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The interface of keeper.c for Python (read by cffi as well). */

#define KEEPER_MOST_PAGES 1024      /* of one request */
#define KEEPER_DOMAIN_BYTES 128     /* the most of a backend's structure */

struct keeper_setup {
    uint64_t nr_pfns;
    /* The struct NativePages of xenbackend/pages.py.  The structure at domain is copied.  What it
     * points to must be memory that only munmap() frees, and stays until the keeper has ended. */
    uint64_t domain, domain_bytes, look, looked;
    int listener;       /* a stream socket that listens */
    int alive;          /* the keeper ends when this descriptor hangs up; -1: none */
};

/* Start a keeper, a child of this process.  Returns its pid or -errno.  *memory: for
 * keeper_free(). */
int keeper_start(const struct keeper_setup *setup, void **memory);
/* Free the memory of a keeper that has ended. */
void keeper_free(void *memory);

/* Memory of zeros that only table_free() frees, and not the end of the interpreter.  NULL: there is
 * no memory. */
void *table_new(size_t bytes);
void table_free(void *table, size_t bytes);
