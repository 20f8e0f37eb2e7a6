/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest without an operating system, of a few MiB, for tests that need no more than a guest.  It
 * does the same with its memory as init.c (pattern.h), and prints the same heartbeat:
 *
 *     heartbeat N steps S errors E longest L ms
 *
 * Command line: rate=N (steps a second; default: as fast as it can), beat=N (milliseconds from one
 * heartbeat to the next; default: 500), areas=1 (registers areas, and prints the first of their
 * pfns, which are successive, and the results).
 *
 *     areas PFN vcpu_info RESULT runstate RESULT time RESULT
 *
 * There is one vCPU, and no interrupt: every 10 ms the guest checks whether xenstored has written
 * into its ring.  So Xen holds none of its frames except those of the two rings and of the areas,
 * and everything else may be paged out: code, stack and page tables as well.  A hypercall whose
 * arguments are paged out fails with EFAULT, while the page is fetched, and is made again.
 *
 * It suspends as Linux does: control/shutdown in xenstore becomes "suspend", which the guest
 * acknowledges by emptying it.  SCHEDOP_shutdown returns when the guest continues: 1 in the same
 * domain, 0 in another one, whose xenstored and console the guest has to find again.
 *
 * Numbers and layouts are those of xen/include/public/: hvm/{hvm_op,params}.h,
 * arch-x86/hvm/start_info.h, sched.h, event_channel.h, vcpu.h, memory.h, io/{console,xs_wire}.h;
 * the hypercall page is arch-x86/cpuid.h's.
 */
#include "pattern.h"

#define EFAULT 14
#define MS 1000000ull
#define TURN (10 * MS)

enum { MEMORY_OP = 12, VCPU_OP = 24, EVENT_CHANNEL_OP = 32, SCHED_OP = 29, HVM_OP = 34 };
enum { XENMEM_add_to_physmap = 7, XENMAPSPACE_shared_info = 0 };
enum { VCPUOP_register_vcpu_info = 10, VCPUOP_register_runstate_phys_area = 14 };
enum { VCPUOP_register_vcpu_time_phys_area = 15 };
enum { SCHEDOP_shutdown = 2, SCHEDOP_poll = 3, EVTCHNOP_send = 4 };
enum { HVMOP_set_param = 0, HVMOP_get_param = 1, HVMOP_get_time = 10 };
enum { PARAM_CALLBACK_IRQ = 0, PARAM_STORE_PFN = 1, PARAM_STORE_EVTCHN = 2 };
enum { PARAM_CONSOLE_PFN = 17, PARAM_CONSOLE_EVTCHN = 18 };
enum { XS_READ = 2, XS_WATCH = 4, XS_WRITE = 11, XS_WATCH_EVENT = 15 };
enum { SHUTDOWN_suspend = 2, DOMID_SELF = 0x7ff0, MEMMAP_RAM = 1 };

struct start_info {
    uint32_t magic, version, flags, nr_modules;
    uint64_t modules, command_line, rsdp, memory_map;
    uint32_t memory_map_entries, reserved;
};

struct memory_map_entry {
    uint64_t address, size;
    uint32_t type, reserved;
};

struct console_ring {
    char in[1024], out[2048];
    uint32_t in_cons, in_prod, out_cons, out_prod;
};

struct store_ring {
    char requests[1024], answers[1024];
    uint32_t request_cons, request_prod, answer_cons, answer_prod;
};

struct store_header {
    uint32_t type, request, transaction, length;
};

extern char hypercall_page[], _end[];

static volatile struct console_ring *console;
static volatile struct store_ring *store;
static uint32_t console_port, store_port;
static int asked;       /* control/shutdown has changed */
static int with_areas;

/* ---- hypercalls ---- */
static void find_hypercalls(void)
{
    uint32_t leaf = 0x40000002, msr, ecx, edx;

    __asm__ volatile("cpuid" : "+a"(leaf), "=b"(msr), "=c"(ecx), "=d"(edx));
    __asm__ volatile("wrmsr"
                     : : "c"(msr), "a"((uint32_t)(uintptr_t)hypercall_page), "d"(0) : "memory");
}

static long call(unsigned number, unsigned long a, unsigned long b, unsigned long c)
{
    char *entry = hypercall_page + number * 32;
    long result;

    do {
        unsigned long first = a, second = b, third = c;

        __asm__ volatile("call *%[entry]"
                         : "=a"(result), "+D"(first), "+S"(second), "+d"(third)
                         : [entry] "r"(entry)
                         : "rcx", "r8", "r9", "r10", "r11", "memory");
    } while (result == -EFAULT);
    return result;
}

static long hypercall(unsigned number, unsigned long operation, void *argument)
{
    return call(number, operation, (unsigned long)argument, 0);
}

struct parameter {
    uint16_t domid;
    uint32_t index;
    uint64_t value;
};

static uint64_t parameter(uint32_t index)
{
    struct parameter get = { DOMID_SELF, index, 0 };

    hypercall(HVM_OP, HVMOP_get_param, &get);
    return get.value;
}

static uint64_t now(void)
{
    uint64_t ns = 0;

    hypercall(HVM_OP, HVMOP_get_time, &ns);
    return ns;
}

static void notify(uint32_t port) { hypercall(EVENT_CHANNEL_OP, EVTCHNOP_send, &port); }

static void sleep_until(uint64_t time)
{
    struct {
        uint64_t ports;
        uint32_t nr_ports;
        uint64_t timeout;
    } poll = { 0, 0, time };

    hypercall(SCHED_OP, SCHEDOP_poll, &poll);
}

/* ---- texts ---- */
static unsigned length(const char *text)
{
    unsigned n = 0;

    while (text[n])
        n++;
    return n;
}

static int starts_with(const char *text, const char *start)
{
    while (*start && *text == *start)
        text++, start++;
    return !*start;
}

static uint64_t option(const char *line, const char *name, uint64_t otherwise)
{
    uint64_t value = 0;

    while (*line && !starts_with(line, name))
        line++;
    if (!*line)
        return otherwise;
    for (line += length(name); *line >= '0' && *line <= '9'; line++)
        value = value * 10 + *line - '0';
    return value;
}

struct text {
    char data[256];
    unsigned n;
};

static void add(struct text *to, const char *text)
{
    while (*text && to->n < sizeof(to->data))
        to->data[to->n++] = *text++;
}

static void add_number(struct text *to, uint64_t value)
{
    char digits[24];
    unsigned at = sizeof(digits);

    digits[--at] = 0;
    do
        digits[--at] = '0' + value % 10;
    while (value /= 10);
    add(to, digits + at);
}

/* ---- rings ---- */
static void copy_in(volatile char *ring, uint32_t size, uint32_t at, const char *data, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        ring[(at + i) % size] = data[i];
}

static void copy_out(char *data, const volatile char *ring, uint32_t size, uint32_t at, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        data[i] = ring[(at + i) % size];
}

/* If there is no room for a line, all of it is left out. */
static void print(const struct text *line)
{
    if (sizeof(console->out) - (console->out_prod - console->out_cons) < line->n)
        return;
    copy_in(console->out, sizeof(console->out), console->out_prod, line->data, line->n);
    __sync_synchronize();
    console->out_prod += line->n;
    notify(console_port);
}

/* Returns whether there was a message.  A message longer than `most` is cut off. */
static int receive(struct store_header *header, char *body, uint32_t most)
{
    uint32_t at, there;

    if (!store)     /* a domain without xenstore */
        return 0;
    at = store->answer_cons;
    there = store->answer_prod - at;
    if (there < sizeof(*header))
        return 0;
    __sync_synchronize();
    copy_out((char *)header, store->answers, sizeof(store->answers), at, sizeof(*header));
    if (there < sizeof(*header) + header->length)
        return 0;
    copy_out(body, store->answers, sizeof(store->answers), at + sizeof(*header),
             header->length < most ? header->length : most);
    __sync_synchronize();
    store->answer_cons = at + sizeof(*header) + header->length;
    notify(store_port);
    return 1;
}

static void look_for_events(void)
{
    struct store_header header;
    char body[64];

    while (receive(&header, body, sizeof(body)))
        asked |= header.type == XS_WATCH_EVENT;
}

/* Return the answer, cut off or filled up with zeros.  There is one request at a time, so the ring
 * has room. */
static void request(uint32_t type, const char *body, unsigned n, char *answer, unsigned most)
{
    struct store_header header = { type, 0, 0, n };
    char bytes[sizeof(header)];
    uint32_t at;

    if (!store)
        return;
    __builtin_memcpy(bytes, &header, sizeof(header));
    at = store->request_prod;
    copy_in(store->requests, sizeof(store->requests), at, bytes, sizeof(bytes));
    copy_in(store->requests, sizeof(store->requests), at + sizeof(header), body, n);
    __sync_synchronize();
    store->request_prod = at + sizeof(header) + n;
    notify(store_port);
    for (;;) {
        for (unsigned i = 0; i < most; i++)
            answer[i] = 0;
        if (!receive(&header, answer, most))
            sleep_until(now() + MS);
        else if (header.type == XS_WATCH_EVENT)
            asked = 1;
        else
            return;
    }
}

/* ---- areas ---- */
enum { VCPU_INFO, RUNSTATE, TIME, SHARED_INFO, AREAS };
static char areas[AREAS][PAGE] __attribute__((aligned(PAGE)));

static void add_result(struct text *to, const char *name, long result)
{
    add(to, name);
    if (result < 0)
        add(to, "-");
    add_number(to, result < 0 ? -result : result);
}

/* Register the areas with the present domain.  Nothing has touched their pages before. */
static void register_areas(void)
{
    struct {
        uint16_t domid, size;
        uint32_t space;
        uint64_t index, gfn;
    } map = { DOMID_SELF, 0, XENMAPSPACE_shared_info, 0, (uintptr_t)areas[SHARED_INFO] / PAGE };
    struct {
        uint64_t gfn;
        uint32_t offset, reserved;
    } info = { (uintptr_t)areas[VCPU_INFO] / PAGE, 0, 0 };
    uint64_t runstate = (uintptr_t)areas[RUNSTATE], time = (uintptr_t)areas[TIME];
    struct text text = { .n = 0 };

    hypercall(MEMORY_OP, XENMEM_add_to_physmap, &map);
    add(&text, "areas ");
    add_number(&text, info.gfn);
    add_result(&text, " vcpu_info ",
               call(VCPU_OP, VCPUOP_register_vcpu_info, 0, (uintptr_t)&info));
    add_result(&text, " runstate ",
               call(VCPU_OP, VCPUOP_register_runstate_phys_area, 0, (uintptr_t)&runstate));
    add_result(&text, " time ",
               call(VCPU_OP, VCPUOP_register_vcpu_time_phys_area, 0, (uintptr_t)&time));
    add(&text, "\r\n");
    print(&text);
}

/* ---- suspending ---- */
static const char CONTROL[] = "control/shutdown";

/* Connect with xenstored and the console's daemon of the present domain. */
static void connect(void)
{
    /* A vector that is never delivered: it shows toolstacks that the guest suspends on request. */
    struct parameter callback = { DOMID_SELF, PARAM_CALLBACK_IRQ, 2ull << 56 | 0xf3 };
    static const char watch[] = "control/shutdown\0stub";
    char answer[8];

    hypercall(HVM_OP, HVMOP_set_param, &callback);
    console = (void *)(parameter(PARAM_CONSOLE_PFN) * PAGE);
    console_port = parameter(PARAM_CONSOLE_EVTCHN);
    store = (void *)(parameter(PARAM_STORE_PFN) * PAGE);
    store_port = parameter(PARAM_STORE_EVTCHN);
    request(XS_WATCH, watch, sizeof(watch), answer, sizeof(answer));
    if (with_areas)
        register_areas();
}

static void suspend_if_asked(void)
{
    uint32_t reason = SHUTDOWN_suspend;
    char answer[16];

    asked = 0;
    request(XS_READ, CONTROL, sizeof(CONTROL), answer, sizeof(answer));
    if (!starts_with(answer, "suspend"))
        return;
    request(XS_WRITE, CONTROL, sizeof(CONTROL), answer, sizeof(answer));
    if (hypercall(SCHED_OP, SCHEDOP_shutdown, &reason) == 0)
        connect();
}

/* ---- memory ---- */
/* From the end of the program to the end of the RAM around it; the start info, which lies there,
 * is overwritten. */
static struct memory find_memory(const struct start_info *info)
{
    const struct memory_map_entry *map = (const void *)info->memory_map;
    uint64_t from = ((uint64_t)_end + PAGE - 1) / PAGE * PAGE, to = from, pages, counts;

    for (unsigned i = 0; i < info->memory_map_entries; i++)
        if (map[i].type == MEMMAP_RAM && map[i].address <= from &&
            from < map[i].address + map[i].size)
            to = map[i].address + map[i].size;
    pages = (to - from) / PAGE;
    counts = (pages * sizeof(uint32_t) + PAGE - 1) / PAGE;
    return (struct memory){
        .writes = (void *)from, .words = (void *)(from + counts * PAGE),
        .pages = pages - counts, .used = WORDS,
    };
}

void run(const struct start_info *info); /* entry.S calls it */
void run(const struct start_info *info)
{
    const char *line = (const char *)info->command_line;
    uint64_t rate = option(line, "rate=", 0), beat = option(line, "beat=", 500) * MS;
    uint64_t beats = 0, last, next, longest = 0;
    uint64_t steps_a_turn = rate ? rate / 100 + 1 : WORDS;
    struct memory memory = find_memory(info);

    with_areas = option(line, "areas=", 0);
    find_hypercalls();
    fill(&memory, 0);
    connect();
    last = next = now();
    for (;;) {
        struct text text = { .n = 0 };
        uint64_t time;

        for (uint64_t i = 0; i < steps_a_turn; i++)
            if (step(&memory)) {
                add(&text, "error: word ");
                add_number(&text, memory.wrong_at);
                add(&text, " is ");
                add_number(&text, memory.wrong);
                add(&text, "\r\n");
            }
        time = now();
        if (time - last > longest)
            longest = time - last;
        last = time;
        if (time >= next || next - time > beat) {   /* the clock of another host may be behind */
            add(&text, "heartbeat ");
            add_number(&text, ++beats);
            add(&text, " steps ");
            add_number(&text, memory.steps);
            add(&text, " errors ");
            add_number(&text, memory.errors);
            add(&text, " longest ");
            add_number(&text, longest / MS);
            add(&text, " ms\r\n");
            longest = 0;
            next = time + beat;
        }
        if (text.n)
            print(&text);
        if (rate)
            sleep_until(time + TURN);
        look_for_events();
        if (asked)
            suspend_if_asked();
    }
}
