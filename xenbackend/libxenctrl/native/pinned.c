/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The pinned set: frames that the hypervisor or the toolstack accesses by number.  And held pages:
 * frames that other programs have mapped.
 *
 * A guest that resumes passes the gfns of its vcpu_info and of its event channel pages to Xen
 * again.  If one is missing, Xen refuses the call: with EINVAL up to 4.17, and from 4.18 on with
 * EAGAIN for vcpu_info, while the pager is asked for the page.  Linux panics at either.  So they
 * have to be present before the guest runs, and the source host has to find them.
 *
 * A page that a back end or the device model has mapped here is not in the set.  Back ends at the
 * other host map pages anew, and their mappings wait for a missing page.
 *
 * A hypervisor with our patch lists the frames that it accesses itself.  Any other does not, so the
 * pages are recognised by what Xen writes into them.  The result may contain further pages, which
 * costs little, because they are only present early.  The result must not lack one:
 *
 *   vcpu_info            has a time record, whose scale (tsc_to_system_mul, tsc_shift) is about the
 *                        same for all vCPUs of a domain and unlike anything else.  The shared info
 *                        page has one too, from before the guest moved its vcpu_info out of there.
 *   time area            (registered by address, from 4.18) is a time record by itself.
 *   runstate area        (the same) has the time for which a vCPU has run: what Xen reports of the
 *                        vCPU or, while the vCPU runs, a little less; a little more if the vCPU has
 *                        run since Xen was asked.
 *   event control block  of a vCPU (FIFO event channels): 16 heads of queues, then nothing.
 *                        Without a single event since the vCPU came up it is all zeros, and not
 *                        recognised.
 *   event array          words of flags (pending, masked, linked) and a port, most of them masked
 *                        only.
 *
 * Time records and runstate areas have an instant, in nanoseconds since the start of Xen.  The
 * instant is later than the start of any guest, and not later than now.  A time record also has a
 * version, which is not 0 once Xen has written the record.  These bounds are needed if the scale is
 * a little above 2^31, that is with 2.0 to 2.6 GHz.  A file of Linux's sysfs (kernfs_node) has its
 * mode in the place of the scale (0x81240000 for a regular file that all may read), the number of
 * its inode in the place of the instant, and 0 in the place of the version.
 *
 * The pages that HVM parameters name are added: xenstore's and the console's rings, the device
 * model's.
 *
 * Sources: xen/include/public/xen.h (vcpu_info, shared_info), vcpu.h (areas), event_channel.h (FIFO
 * ABI), hvm/params.h; map_guest_area() in xen/common/domain.c, event_fifo.c (Xen 4.17 to 4.22).
 */
#include <time.h>
#include "internal.h"
#include <xen/event_channel.h>
#include <xen/vcpu.h>
#include <xen/xen.h>

#define GFN_MASK ((1ull << HOLDS_SHIFT) - 1)
#define NAMED_MOST 32
#define SHORTEST_NS 1000000000ull                 /* from the start of Xen to that of a guest */
#define START_NS (3600 * 1000000000ull)           /* and to that of dom0, at most */

long xen_held(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint64_t *out)
{
    struct call_buffer *b;
    long count = 0;
    int rc = 0;

    if (!h->has_populate_evicted)
        return 0;
    b = take_buffer(h);
    for (size_t done = 0; !rc && done < n; done += BATCH_GFNS) {
        size_t batch = batch_of(n - done);
        const uint64_t *answer = (const uint64_t *)b->data;

        memcpy(b->data, gfns + done, batch * sizeof(*gfns));
        rc = paging_op(h, b, domid, XENMEM_paging_op_query_held, b->data, batch);
        for (size_t i = 0; !rc && i < batch; i++)
            if (answer[i] != ~0ull)
                out[count++] = answer[i] & GFN_MASK;
    }
    give_buffer(b);
    return rc ? rc : count;
}

long xen_list_pinned(struct xen_host *h, uint32_t domid, uint64_t *out)
{
    struct call_buffer *b = take_buffer(h);
    int rc = paging_op(h, b, domid, XENMEM_paging_op_list_pinned, b->data, BATCH_GFNS);
    long count = b->op->gfn;

    if (!rc && count <= BATCH_GFNS)
        memcpy(out, b->data, count * sizeof(*out));
    give_buffer(b);
    if (rc == -ENODEV)      /* for operations that it does not have, Xen requires a ring first */
        rc = -ENOSYS;
    return rc ? rc : count <= BATCH_GFNS ? count : -E2BIG;
}

/* ---- recognition ---- */
/* The scale of a time record: nanoseconds for 2^32 ticks of the TSC; 0 if it is no time record.
 * Xen chooses the factor so that its highest bit is set (set_time_scale() in
 * xen/arch/x86/time.c). */
static double time_scale(const vcpu_time_info_t *time)
{
    if (!(time->tsc_to_system_mul >> 31) || time->tsc_shift < -32 || time->tsc_shift > 32 ||
        time->pad0 || time->pad1[0] || time->pad1[1])
        return 0;
    return time->tsc_shift < 0 ? (double)time->tsc_to_system_mul / (1ull << -time->tsc_shift) :
                                 (double)time->tsc_to_system_mul * (1ull << time->tsc_shift);
}

/* The scale of the domain's time records; 0 if the guest has not mapped its shared info page, and
 * so has moved nothing out of that page. */
static double domain_time_scale(struct xen_host *h, uint32_t domid, const struct xen_info *info)
{
    xen_pfn_t gfn = info->shared_info_gfn;
    double scale = 0;
    int error;
    shared_info_t *shared = xenforeignmemory_map(h->fmem, domid, PROT_READ, 1, &gfn, &error);

    if (!shared)
        return 0;
    if (!error)
        scale = time_scale(&shared->vcpu_info[0].time);
    xenforeignmemory_unmap(h->fmem, shared, 1);
    return scale;
}

/* What Xen writes into the areas of one domain. */
struct areas {
    double scale;               /* of time records; 0 if it is not known */
    unsigned vcpus;
    uint64_t *ran;              /* for how many nanoseconds each vCPU had run */
    uint64_t asked_ns;          /* when Xen was asked for that, by now_ns() */
    uint64_t longest_ns;        /* Xen has not run for longer than this */
};

/* The time since the kernel of this domain started. */
static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_BOOTTIME, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

/* Xen started before this domain.  The clocks of both differ by less than a factor of two. */
static uint64_t longest_ns(void)
{
    return 2 * (now_ns() + START_NS);
}

static int domain_areas(struct xen_host *h, uint32_t domid, struct areas *areas)
{
    struct xen_info info;
    int rc = xen_domain_info(h, domid, &info);

    *areas = (struct areas){ 0 };
    if (rc)
        return rc;
    areas->scale = domain_time_scale(h, domid, &info);
    areas->ran = calloc(info.vcpus + 1, sizeof(*areas->ran));
    if (!areas->ran)
        return -ENOMEM;
    areas->asked_ns = now_ns();
    areas->longest_ns = longest_ns();
    for (; areas->vcpus < info.vcpus; areas->vcpus++) {
        xc_vcpuinfo_t vcpu;

        if (!xc_vcpu_getinfo(h->xch, domid, areas->vcpus, &vcpu))
            areas->ran[areas->vcpus] = vcpu.cpu_time;
    }
    return 0;
}

static int is_instant(uint64_t ns, const struct areas *areas)
{
    return ns >= SHORTEST_NS && ns <= areas->longest_ns;
}

/* The scales are compared roughly, because Xen calibrates them again from time to time, with the
 * error of the machine's timers (5% under emulation). */
static int is_time_record(const uint64_t *at, const struct areas *areas)
{
    const vcpu_time_info_t *time = (const void *)at;
    double found = time_scale(time);

    return found && found > areas->scale * 0.75 && found < areas->scale * 1.25 &&
           time->version && is_instant(time->system_time, areas);
}

/* The times of all states are those from the creation of the vCPU to the last change of its
 * state.  The state of a vCPU that runs has not changed for some time, at most since log-dirty was
 * switched on or read, because that pauses all vCPUs.  Or it has changed since Xen was asked; the
 * clocks of Xen and of dom0 differ by less than a factor of two. */
static int is_runstate(const uint64_t *at, const struct areas *areas)
{
    const vcpu_runstate_info_t *runstate = (const void *)at;
    uint64_t entered = runstate->state_entry_time & ~XEN_RUNSTATE_UPDATE;
    uint64_t ran = runstate->time[RUNSTATE_running], sum = 0, since;

    if (at[0] > RUNSTATE_offline || !is_instant(entered, areas) || !ran || ran > entered)
        return 0;
    for (unsigned i = 0; i < 4; i++)
        sum += runstate->time[i];
    if (sum > entered)
        return 0;
    since = 2 * (now_ns() - areas->asked_ns);
    for (unsigned i = 0; i < areas->vcpus; i++)
        if (ran <= areas->ran[i] + since && ran > areas->ran[i] / 2)
            return 1;
    return 0;
}

static int has_area(const uint64_t *page, const struct areas *areas)
{
    for (unsigned i = 0; i <= (XC_PAGE_SIZE - sizeof(vcpu_time_info_t)) / 8; i++)
        if (is_time_record(page + i, areas) ||
            (i <= (XC_PAGE_SIZE - sizeof(vcpu_runstate_info_t)) / 8 &&
             is_runstate(page + i, areas)))
            return 1;
    return 0;
}

static int is_control_block(const uint64_t *page)
{
    const struct evtchn_fifo_control_block *block = (const void *)page;
    uint32_t any = 0;

    for (unsigned i = 0; i <= EVTCHN_FIFO_PRIORITY_MIN; i++) {
        if (block->head[i] & ~((1u << EVTCHN_FIFO_LINK_BITS) - 1))
            return 0;
        any |= block->head[i];
    }
    if (!any || block->ready >> (EVTCHN_FIFO_PRIORITY_MIN + 1) || block->_rsvd)
        return 0;
    for (unsigned i = sizeof(*block) / 8; i < XC_PAGE_SIZE / 8; i++)
        if (page[i])
            return 0;
    return 1;
}

static int is_event_array(const uint64_t *page)
{
    const uint32_t *word = (const uint32_t *)page;
    const uint32_t masked = 1u << EVTCHN_FIFO_MASKED;
    const uint32_t nothing = ~(1u << EVTCHN_FIFO_PENDING | masked | 1u << EVTCHN_FIFO_LINKED |
                               1u << EVTCHN_FIFO_BUSY | ((1u << EVTCHN_FIFO_LINK_BITS) - 1));
    unsigned count = 0;

    for (unsigned i = 0; i < XC_PAGE_SIZE / 4; i++) {
        if (word[i] & nothing)
            return 0;
        count += !!(word[i] & masked);
    }
    return count > 0;
}

/* Find the gfns that parameters name, NAMED_MOST at most.  A parameter names one gfn; the device
 * model's pages are neighbours. */
static long named_by_parameter(struct xen_host *h, uint32_t domid, uint64_t *named)
{
    static const int params[] = { HVM_PARAM_STORE_PFN, HVM_PARAM_CONSOLE_PFN, HVM_PARAM_IOREQ_PFN,
                                  HVM_PARAM_BUFIOREQ_PFN, HVM_PARAM_IDENT_PT,
                                  HVM_PARAM_MONITOR_RING_PFN, HVM_PARAM_SHARING_RING_PFN };
    uint64_t value, pages = 0;
    long count = 0;

    for (unsigned i = 0; i < sizeof(params) / sizeof(*params); i++)
        if (!xc_hvm_param_get(h->xch, domid, params[i], &value) && value)
            named[count++] = params[i] == HVM_PARAM_IDENT_PT ? value >> XC_PAGE_SHIFT : value;
    if (!xc_hvm_param_get(h->xch, domid, HVM_PARAM_VM86_TSS_SIZED, &value) && value)
        named[count++] = (uint32_t)value >> XC_PAGE_SHIFT;
    if (!xc_hvm_param_get(h->xch, domid, HVM_PARAM_NR_IOREQ_SERVER_PAGES, &pages) && pages &&
        !xc_hvm_param_get(h->xch, domid, HVM_PARAM_IOREQ_SERVER_PFN, &value) && value)
        for (uint64_t i = 0; i < pages && count < NAMED_MOST; i++)
            named[count++] = value + i;
    return count;
}

long xen_recognise_pinned(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n,
                          uint64_t *out)
{
    uint8_t status[BATCH_GFNS];
    const void *pages[BATCH_GFNS];
    struct xen_view view;
    struct areas areas;
    long count = 0;
    int rc = domain_areas(h, domid, &areas);

    for (size_t done = 0; !rc && done < n; done += BATCH_GFNS) {
        size_t batch = batch_of(n - done);

        rc = xen_map(h, domid, gfns + done, batch, status, pages, &view);
        for (size_t i = 0; !rc && i < batch; i++)
            if (status[i] == PAGE_DATA &&
                (has_area(pages[i], &areas) || is_control_block(pages[i]) ||
                 is_event_array(pages[i])))
                out[count++] = gfns[done + i];
        xen_unmap(h, &view);
    }
    free(areas.ran);
    return rc ? rc : count;
}

static int compare_gfns(const void *a, const void *b)
{
    uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;

    return one < other ? -1 : one > other;
}

static int contains(const uint64_t *gfns, size_t n, uint64_t gfn)
{
    return n && bsearch(&gfn, gfns, n, sizeof(*gfns), compare_gfns);
}

long xen_pinned(struct xen_host *h, uint32_t domid, const uint64_t *gfns, size_t n, uint64_t *out)
{
    uint64_t named[BATCH_GFNS + NAMED_MOST];
    long listed = xen_list_pinned(h, domid, named), count = 0, recognised;

    if (listed == -ENOSYS) {
        listed = 0;
        count = xen_recognise_pinned(h, domid, gfns, n, out);
    }
    if (listed < 0 || count < 0)
        return listed < 0 ? listed : count;
    listed += named_by_parameter(h, domid, named + listed);
    qsort(named, listed, sizeof(*named), compare_gfns);
    recognised = count;
    for (long i = 0; i < listed; i++)
        if ((!i || named[i] != named[i - 1]) && contains(gfns, n, named[i]) &&
            !contains(out, recognised, named[i]))
            out[count++] = named[i];
    return count;
}
