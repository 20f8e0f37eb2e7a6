/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a guest of the lab does with its CD, which the device model emulates: a thread reads pieces
 * of the CD without the page cache, and checks them.  A piece is read into other pages each time.
 * The device model maps these pages, of which most are missing after a migration.  The CD has the
 * words cd_word(0), cd_word(1) and so on (dom0/hvm.py writes them).
 *
 *     cd reads R errors E mismatches M
 */
#define CD "/dev/sr0"
#define CD_PIECE (16 * PAGE)
#define CD_PIECES 32ul          /* of the CD */
#define CD_AREA (64 * CD_PIECE)
#define CD_PAUSE_US 100000

struct cd {
    int fd;
    unsigned char *area;
    _Atomic uint64_t reads, errors, mismatches;
};

static const char *const cd_drivers[] = { "/scsi_common.ko", "/scsi_mod.ko", "/libata.ko",
                                          "/ata_piix.ko", "/cdrom.ko", "/sr_mod.ko" };

static uint64_t cd_word(uint64_t i)
{
    return i * 0x9e3779b97f4a7c15ull;
}

static void *use_cd(void *argument)
{
    struct cd *cd = argument;

    for (uint64_t turn = 0;; turn++) {
        uint64_t piece = mix(turn) % CD_PIECES;
        uint64_t *buffer = (uint64_t *)(cd->area + mix(~turn) % (CD_AREA / CD_PIECE) * CD_PIECE);

        if (pread(cd->fd, buffer, CD_PIECE, piece * CD_PIECE) != (ssize_t)CD_PIECE) {
            cd->errors++;
            printf("CD error: piece %lu: %s\n", (unsigned long)piece, strerror(errno));
        } else {
            for (uint64_t i = 0; i < CD_PIECE / 8; i++)
                if (buffer[i] != cd_word(piece * CD_PIECE / 8 + i)) {
                    cd->mismatches++;
                    break;
                }
        }
        cd->reads++;
        usleep(CD_PAUSE_US);
    }
    return NULL;
}

/* Returns whether the CD is there and used. */
static int start_cd(struct cd *cd)
{
    pthread_t thread;

    for (unsigned i = 0; i < sizeof(cd_drivers) / sizeof(*cd_drivers); i++)
        if (!load(cd_drivers[i])) {
            printf("no driver for a CD: %s: %s\n", cd_drivers[i], strerror(errno));
            return 0;
        }
    cd->fd = open_device(CD, O_RDONLY | O_DIRECT);
    if (cd->fd < 0) {
        printf("no CD: %s\n", strerror(errno));
        return 0;
    }
    cd->area = mmap(NULL, CD_AREA, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (cd->area == MAP_FAILED || pthread_create(&thread, NULL, use_cd, cd)) {
        printf("no memory for the CD's requests\n");
        return 0;
    }
    printf("CD is used\n");
    return 1;
}

static void print_cd(struct cd *cd)
{
    printf("cd reads %lu errors %lu mismatches %lu\n", (unsigned long)cd->reads,
           (unsigned long)cd->errors, (unsigned long)cd->mismatches);
}
