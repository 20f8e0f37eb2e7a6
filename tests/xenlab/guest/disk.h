/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a guest of the lab does with its disk: threads write blocks and read them back with
 * O_DIRECT, and check all that they read.  Each request uses another page of a large area that was
 * filled before, so that after a migration the page is missing when dom0 is given it.
 *
 *     disk requests R errors E mismatches M longest L ms
 */
#include <pthread.h>
#include <stdatomic.h>

#define DISK "/dev/xvda"
#define DISK_BLOCKS 4096ul
#define DISK_PAUSE_US 20000     /* between two requests of a thread: dom0's CPU has other work */

struct disk {
    int fd;
    unsigned threads;
    uint64_t buffers;           /* pages of the area, for each thread */
    unsigned char *area;
    _Atomic uint64_t requests, errors, mismatches, longest_us;
};

struct disk_thread {
    struct disk *disk;
    unsigned number;
    uint32_t writes[DISK_BLOCKS];
};

static void disk_done(struct disk *disk, double seconds, int failed, uint64_t block)
{
    uint64_t took = seconds * 1e6, longest = disk->longest_us;

    while (took > longest && !atomic_compare_exchange_weak(&disk->longest_us, &longest, took))
        ;
    disk->requests++;
    if (failed) {
        disk->errors++;
        printf("disk error: block %lu: %s\n", (unsigned long)block, strerror(errno));
    }
}

static void *use_disk(void *argument)
{
    struct disk_thread *own = argument;
    struct disk *disk = own->disk;
    unsigned char *area = disk->area + own->number * disk->buffers * PAGE;
    uint64_t blocks = DISK_BLOCKS / disk->threads, first = own->number * blocks;

    for (uint64_t turn = 0;; turn++) {
        uint64_t block = mix(turn / 2) % blocks, at = (first + block) * PAGE;
        uint64_t *buffer = (uint64_t *)(area + mix(turn) % disk->buffers * PAGE);
        uint32_t writes = own->writes[block] + !(turn % 2);
        ssize_t done;
        double began;

        if (turn % 2 == 0)
            for (unsigned i = 0; i < WORDS; i++)
                buffer[i] = word(first + block, writes, i);
        began = now();
        done = turn % 2 ? pread(disk->fd, buffer, PAGE, at) : pwrite(disk->fd, buffer, PAGE, at);
        disk_done(disk, now() - began, done != (ssize_t)PAGE, first + block);
        if (done != (ssize_t)PAGE) {
            turn -= !(turn % 2);    /* repeat a write: the block may have either contents */
            continue;
        }
        own->writes[block] = writes;
        for (unsigned i = 0; i < WORDS; i++)
            if (buffer[i] != word(first + block, writes, i)) {
                disk->mismatches++;
                break;
            }
        usleep(DISK_PAUSE_US);
    }
    return NULL;
}

/* Returns whether the disk is there and used. */
static int start_disk(struct disk *disk)
{
    if (!load("/xen-blkfront.ko")) {
        printf("no driver for a disk: %s\n", strerror(errno));
        return 0;
    }
    disk->fd = open_device(DISK, O_RDWR | O_DIRECT);
    if (disk->fd < 0) {
        printf("no disk: %s\n", strerror(errno));
        return 0;
    }
    disk->area = mmap(NULL, disk->threads * disk->buffers * PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (disk->area == MAP_FAILED) {
        printf("no memory for the disk's requests\n");
        return 0;
    }
    for (unsigned number = 0; number < disk->threads; number++) {
        struct disk_thread *own = calloc(1, sizeof(*own));
        pthread_t thread;

        if (!own)
            return 0;
        own->disk = disk;
        own->number = number;
        if (pthread_create(&thread, NULL, use_disk, own)) {
            free(own);
            return 0;
        }
    }
    printf("disk is used\n");
    return 1;
}

static void print_disk(struct disk *disk)
{
    printf("disk requests %lu errors %lu mismatches %lu longest %lu ms\n",
           (unsigned long)disk->requests, (unsigned long)disk->errors,
           (unsigned long)disk->mismatches,
           (unsigned long)atomic_exchange(&disk->longest_us, 0) / 1000);
}
