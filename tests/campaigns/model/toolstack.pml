/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The handover of a guest that xl migrates, between a sender and a receiver that may each be
 * killed, over a link that may be lost.
 *
 * xl decides.  It has two halves, one at each host, and a helper of ours at each half.  When both
 * helpers have ended, the halves agree by one message each, and the half at the source destroys or
 * resumes its domain.  Each half and each helper may be killed at any instant, and the stream
 * between the halves may be cut.  If both halves end without a decision, an administrator unpauses
 * or destroys the guest at the destination.
 *
 * xl destroys the source while its page is missing at the destination.  So the sender maps the
 * page, and so does the keeper, which shares the sender's memory.  A mapping ends with its process.
 * A keeper that is killed alone is replaced, and an instant passes until then.
 *
 * One page stands for all that are missing.  The journal and the domains outlive a process.
 * Checked is what session.pml lists.  In addition, the page may be lost only if the sender and its
 * keeper were both killed, and then the receiver reports the loss.
 */
#ifndef CUTS
#define CUTS 1
#endif
#ifndef KILLS
#define KILLS 3
#endif
#ifndef FAILURES
#define FAILURES 1
#endif
#ifndef MUTATION
#define MUTATION 0
#endif

#define RESUMES_WHILE_UNDECIDED       1
#define NO_JOURNAL_BEFORE_ENTRUST     2
#define LETS_GO_BEFORE_DECIDED        3
#define HOLDS_TOO_LATE                4
#define KEEPER_STARTS_TOO_LATE        5
#define KEEPER_IS_NOT_REPLACED        6
#define KEEPER_IS_LEFT                7
#define SUCCESSOR_IGNORES_KEEPER      8
#define SUCCESSOR_DOES_NOT_HOLD       9
#define IGNORES_THE_REPORT           10
#define DESTROYS_NOTHING_THAT_XL_LEFT 11
#define STARTS_WHAT_IS_ENTRUSTED     12
#define REPORTS_WHOLE_WHEN_LOST      13
#define ANSWERS_BEFORE_LOST_IS_NOTED 14
#define ANSWERS_BEFORE_WHOLE_IS_NOTED 15
#define BELIEVES_AN_ABORT_ARRIVED    16
#define TELLS_BEFORE_IT_IS_NOTED     17

mtype = { context, ready, entrust, handover, page, loaded, resumed, complete, completed, abort,
          rejoin, lost, at_ready, at_decision, at_own, ended, failed, refused };
/* journals */
mtype = { NONE, BEGUN, DECIDING, HANDED, COMPLETING, GIVEN_UP, MADE, READY, ENTRUSTED, OWN,
          FINISHING, LOST };
/* helpers */
mtype = { RUNS, SUCCEEDED, FAILED };

#include "link.pml"

/* What outlives a process. */
mtype s_journal = NONE, r_journal = NONE;
bool s_runs = true;             /* the guest runs at the source */
bool r_runs;                    /* the guest runs at the destination */
bool s_domain = true;           /* the source's domain, with its page, is there */
bool r_domain = true;           /* xl has made it */
bool r_page;
bool s_over;                    /* nothing is left to do */

/* The mappings of the page. */
bool s_maps;                    /* by the sender */
bool k_maps;                    /* by the keeper */
bool k_killed;                  /* the keeper was killed, and the sender has not noticed it */
bool both_killed;               /* the keeper and its sender, and no successor has the page */

/* xl.  A half that is over has closed its end of the stream between them. */
mtype s_helper = RUNS, r_helper = RUNS;
bool x_cut, x_ready, x_go, x_report;
bool xs_over, xs_killed, xd_over, xd_killed;
byte failures = FAILURES;

#define PAGE_IS_HERE (s_domain || s_maps || k_maps)
#define GIVEN_AWAY   (s_journal == DECIDING || s_journal == HANDED)

/* ---- the sender ---- */
/* Map the page if its domain is there, and start a keeper if there is none. */
inline hold() { if :: s_domain -> s_maps = true; k_maps = true :: else -> skip fi }

inline settled() {
    d_step {
        s_journal = NONE; s_over = true; s_maps = false; k_killed = false;
#if MUTATION != KEEPER_IS_LEFT
        k_maps = false
#endif
    }
}

/* xl resumes the guest, or the sender does.  abort is sent when that is noted, because the receiver
 * then forgets the session; in BEGUN a successor would do the same without the receiver. */
inline give_up() {
    atomic {
        if :: s_helper == RUNS -> s_helper = FAILED :: else -> skip fi;
#if MUTATION != TELLS_BEFORE_IT_IS_NOTED
        if :: s_journal == BEGUN -> s_says(abort) :: else -> skip fi
#else
        s_says(abort)
#endif
    };
    assert(s_domain);
    s_runs = true;
    s_journal = GIVEN_UP
}

inline push() { if :: PAGE_IS_HERE -> s_says(page) :: else -> skip fi }

inline entrust_guest() {
#if MUTATION != NO_JOURNAL_BEFORE_ENTRUST
    s_journal = DECIDING;
#endif
    s_says(entrust);
    d_step { if :: s_helper == RUNS -> s_helper = SUCCEEDED :: else -> skip fi };
#if MUTATION == NO_JOURNAL_BEFORE_ENTRUST
    s_journal = DECIDING;
#endif
#if MUTATION == HOLDS_TOO_LATE
    hold();
#endif
#if MUTATION == KEEPER_STARTS_TOO_LATE
    d_step { if :: s_maps -> k_maps = true :: else -> skip fi };
#endif
    atomic { push() }
}

inline migrate() {
    atomic {
        s_journal = BEGUN;
        connect();
#if MUTATION == KEEPER_STARTS_TOO_LATE
        s_maps = true
#elif MUTATION != HOLDS_TOO_LATE
        hold()
#endif
    };
    if
    :: xs_over || s_helper == FAILED -> give_up()
    :: atomic { !xs_over && s_helper == RUNS -> s_runs = false; s_says(context) };
        if
        :: to_s?ready -> entrust_guest()
        :: s_lost -> give_up()
        :: true -> give_up()        /* cancelled, or a helper or the receiver has failed */
        fi
    fi
}

/* A successor without a keeper maps the page itself. */
inline hold_again() {
#if MUTATION == SUCCESSOR_DOES_NOT_HOLD
    skip;
#else
    if :: !s_maps && !k_maps && !released -> hold() :: else -> skip fi;
#endif
    if :: PAGE_IS_HERE -> both_killed = false :: else -> skip fi
}

inline take_up_again() {
    atomic { connect(); s_says(rejoin); said_handover = false };
    if
    :: atomic { to_s?at_ready -> hold_again(); s_says(entrust); push() }
    :: atomic { to_s?at_decision -> hold_again(); push() }
    :: atomic { to_s?at_own -> said_handover = true; hold_again(); push() }
    :: to_s?complete -> s_journal = COMPLETING
    :: to_s?ended -> stays = true
    :: to_s?failed -> in_doubt = true
    :: s_lost -> skip
    fi
}

inline feed() {
    if
    :: to_s?loaded -> released = true;
        if :: s_maps -> s_maps = false; k_maps = false :: else -> skip fi;
#if MUTATION == LETS_GO_BEFORE_DECIDED
        s_domain = false
#endif
    :: to_s?resumed -> reported = true
    :: to_s?complete -> s_journal = COMPLETING
    :: to_s?ended -> stays = true
    :: to_s?failed -> in_doubt = true
    :: to_s?refused -> skip
    fi
}

/* The page is lost: only the receiver can have it. */
inline tell_loss() {
    atomic { s_journal = HANDED; connect(); s_says(lost) };
    if
    :: to_s?refused -> settled()
    :: s_lost -> skip
    fi
}

inline tell() {
    atomic { connect(); s_says(abort) };
    if
    :: to_s?refused -> settled()
#if MUTATION == BELIEVES_AN_ABORT_ARRIVED
    :: s_lost -> settled()
#else
    :: s_lost -> skip
#endif
    fi
}

/* xl destroys the domain, or the sender when xl has left it. */
inline finish() {
    s_says(completed);
    if
    :: !s_domain
    :: d_step { s_domain && xs_over -> assert(!s_runs);
#if MUTATION != DESTROYS_NOTHING_THAT_XL_LEFT
            s_domain = false
#endif
       }
    fi;
    settled()
}

active proctype Sender()
{
    bool reported;          /* the receiver has reported that the guest runs there */
    bool stays;             /* it has reported that the guest never ran there */
    bool in_doubt;          /* it cannot find out whether the guest ran there */
    bool said_handover;
    bool released;          /* the destination has the page */

    do
    :: {
        do
        :: s_over -> (false)
        :: !s_over && s_journal == NONE -> migrate()
        :: s_journal == BEGUN -> give_up()
        :: s_journal == DECIDING && !s_domain -> s_journal = HANDED
        :: s_journal == DECIDING && (s_runs || stays) -> give_up()
#if MUTATION == RESUMES_WHILE_UNDECIDED
        :: s_journal == DECIDING && s_lost -> give_up()
#endif
#if MUTATION != IGNORES_THE_REPORT
        :: s_journal == DECIDING && reported && xs_over -> s_journal = HANDED
#endif
        :: GIVEN_AWAY && !PAGE_IS_HERE && !released -> tell_loss()
        :: GIVEN_AWAY && (PAGE_IS_HERE || released) && s_lost && !in_doubt && !stays ->
            take_up_again()
        :: atomic { GIVEN_AWAY && !s_lost && nempty(to_s) -> feed() }
        :: atomic { s_journal == HANDED && !s_lost && !said_handover -> said_handover = true;
            s_says(handover) }
        :: s_journal == GIVEN_UP -> tell()
        :: s_journal == COMPLETING -> finish()
        od
    } unless { s_dead -> d_step {
        s_dead = false; cut();
        reported = false; stays = false; in_doubt = false; said_handover = false; released = false;
#if MUTATION == SUCCESSOR_IGNORES_KEEPER
        k_maps = false
#endif
    } }
    od
}

/* A keeper that is killed has a successor, if the sender lives. */
active proctype Replacement()
{
    do
    :: d_step { k_killed && s_maps -> k_killed = false;
#if MUTATION != KEEPER_IS_NOT_REPLACED
            k_maps = true
#endif
       }
    od
}

/* ---- the receiver ---- */
/* The domain is xl's, which destroys it when the helper has failed. */
inline discard() {
    r_journal = NONE;
    if :: r_helper == RUNS -> r_helper = FAILED :: else -> skip fi
}

/* No lane is used after that. */
inline say_end() {
    if
    :: blind -> r_says(failed)          /* the guest may have run here */
    :: else -> r_says(ended)
    fi;
    joined = false
}

inline lose() {
#if MUTATION == ANSWERS_BEFORE_LOST_IS_NOTED
    r_says(refused);
#endif
#if MUTATION == REPORTS_WHOLE_WHEN_LOST
    r_journal = FINISHING;
#else
    r_journal = LOST;
#endif
    r_says(refused)
}

/* The source has nothing of the guest any more, and nothing is missing. */
inline be_whole() {
#if MUTATION == ANSWERS_BEFORE_WHOLE_IS_NOTED
    r_says(refused);
#endif
    r_journal = OWN;
    r_says(refused);
    is_settled = true
}

inline take() {
    if
    :: heard == context && r_journal == NONE && r_helper == RUNS -> r_journal = MADE; joined = true
    :: heard == entrust && r_journal == READY -> r_journal = ENTRUSTED;
#if MUTATION == STARTS_WHAT_IS_ENTRUSTED
        r_runs = true
#endif
    :: heard == handover && r_journal == ENTRUSTED -> r_journal = OWN
    :: heard == page && (r_journal == ENTRUSTED || r_journal == OWN) && r_domain ->
        r_page = true; r_says(loaded)
    :: heard == rejoin && (r_journal == READY || r_journal == ENTRUSTED) && !r_domain -> say_end()
    :: heard == rejoin && r_journal == READY && r_domain -> joined = true; r_says(at_ready)
    :: heard == rejoin && r_journal == ENTRUSTED && r_domain ->
        joined = true; said_resumed = false; r_says(at_decision)
    :: heard == rejoin && r_journal == OWN && !r_page ->
        joined = true; said_complete = false; r_says(at_own)
    :: heard == rejoin && r_journal == OWN && r_page -> r_says(complete)
    :: heard == rejoin && r_journal == FINISHING -> r_says(complete)
    :: heard == abort ->
        assert(!r_runs && r_journal != OWN && r_journal != FINISHING);
        discard();
        r_says(refused)
    :: heard == completed -> r_journal = NONE
    :: else -> r_says(refused)
    fi;
    heard = 0
}

active proctype Receiver()
{
    mtype heard;
    bool said_ready, said_resumed, said_complete;
    bool joined;            /* the sender has sent its first message on these lanes */
    bool blind;             /* this process has not seen whether the guest ran */
    bool is_settled;        /* the sender needs no further message */

    do
    :: {
        do
        :: atomic { r_takes_connection() -> joined = false }
        :: atomic { (r_journal == MADE || r_journal == READY) && !said_ready &&
            (!joined || r_lost || r_helper == FAILED) -> discard() }
        :: r_journal == MADE && joined && !r_lost -> r_journal = READY
        :: atomic { r_journal == READY && !said_ready && joined && !r_lost -> said_ready = true;
            r_says(ready) }
        :: r_journal == ENTRUSTED && r_helper == RUNS -> r_helper = SUCCEEDED
        :: atomic { joined && !r_lost && (r_journal == READY || r_journal == ENTRUSTED) &&
            !r_domain -> say_end(); r_lost = true }
        :: atomic { joined && !r_lost && r_journal == ENTRUSTED && r_runs && !said_resumed ->
            said_resumed = true; r_says(resumed) }
        :: atomic { joined && !r_lost && r_journal == OWN && r_page && !said_complete ->
            said_complete = true; r_says(complete) }
        :: ((r_lost && !r_fresh) || is_settled) && r_journal == OWN && r_page ->
            r_journal = FINISHING                       /* the ring is given up */
        :: atomic { !r_lost && to_r?[lost] && !r_page -> to_r?lost };
            if
            :: r_journal == ENTRUSTED || r_journal == OWN -> lose()
            :: else -> r_says(refused)
            fi
        :: atomic { !r_lost && to_r?[lost] && r_page -> to_r?lost };
            if
            :: r_journal == ENTRUSTED || r_journal == OWN -> be_whole()
            :: else -> r_says(refused)
            fi
        :: atomic { !r_lost && nempty(to_r) && !(to_r?[lost]) -> to_r?heard; take() }
        od
    } unless { r_dead -> d_step {
        r_dead = false; cut(); heard = 0;
        said_ready = (r_journal == READY);              /* it may have been sent */
        blind = (r_journal == ENTRUSTED && !r_domain);
        said_resumed = false; said_complete = false; joined = false; is_settled = false
    } }
    od
}

/* ---- xl ---- */
active proctype XlSource()
{
    {
        if
        :: s_helper == SUCCEEDED ->
            if
            :: atomic { x_ready -> if :: !x_cut -> x_go = true :: else -> skip fi };
                if
                :: atomic { x_report -> assert(!s_runs); s_domain = false; xs_over = true }
                :: atomic { (xd_over || x_cut) && !x_report -> xs_over = true }
                        /* "Domain state is now undefined" */
                fi
            :: atomic { !x_ready && (xd_over || x_cut) ->
                if :: s_domain -> s_runs = true :: else -> skip fi; xs_over = true }
            fi
        :: atomic { s_helper == FAILED ->
            if :: s_domain -> s_runs = true :: else -> skip fi; xs_over = true }
        fi
    } unless { xs_killed }
}

active proctype XlDestination()
{
    {
        if
        :: atomic { r_helper == SUCCEEDED -> if :: !x_cut -> x_ready = true :: else -> skip fi };
            if
            :: x_go -> r_runs = true;
                atomic { if :: !x_cut -> x_report = true :: else -> skip fi; xd_over = true }
            :: atomic { !x_go && (xs_over || x_cut) -> r_domain = false; xd_over = true }
            fi
        :: atomic { r_helper == FAILED -> r_domain = false; xd_over = true }
        fi
    } unless { xd_killed }
}

/* ---- the faults ---- */
inline kill_source() {
    xs_killed = true; xs_over = true;
    if :: s_helper == RUNS -> s_helper = FAILED :: else -> skip fi
}
inline kill_destination() {
    xd_killed = true; xd_over = true;
    if :: r_helper == RUNS -> r_helper = FAILED :: else -> skip fi
}
/* What was sent and not read is lost. */
inline cut_stream() {
    x_cut = true;
    if :: x_ready && !x_go -> x_ready = false :: else -> skip fi;
    if :: x_go && !r_runs -> x_go = false :: else -> skip fi;
    if :: x_report && s_domain -> x_report = false :: else -> skip fi
}

active proctype Faults()
{
    do
    :: d_step { cuts > 0 && link -> cuts--; cut() }
    :: d_step { kills > 0 && !s_dead -> kills--; s_dead = true;
            if :: s_maps && !k_maps && k_killed -> both_killed = true :: else -> skip fi;
            s_maps = false; k_killed = false;
            if :: s_helper == RUNS -> s_helper = FAILED :: else -> skip fi }
    :: d_step { kills > 0 && !r_dead -> kills--; r_dead = true;
            if :: r_helper == RUNS -> r_helper = FAILED :: else -> skip fi }
    :: d_step { kills > 0 && k_maps -> kills--; k_maps = false;
            if :: s_maps -> k_killed = true :: else -> both_killed = true fi }
    :: d_step { failures > 0 && !xs_over -> failures--; kill_source() }
    :: d_step { failures > 0 && !xd_over -> failures--; kill_destination() }
    :: d_step { failures > 0 && s_helper == RUNS -> failures--; s_helper = FAILED }
    :: d_step { failures > 0 && r_helper == RUNS -> failures--; r_helper = FAILED }
    :: d_step { failures > 0 && !x_cut -> failures--; cut_stream() }
    :: d_step { cuts = 0; kills = 0; failures = 0 }; break
    od
}

active proctype Watch()
{
    /* Nothing can happen any more. */
    timeout ->
    if
    :: s_domain && !s_runs && r_domain && !r_runs ->
        assert(xs_over && xd_over);
        if          /* an administrator decides at the destination */
        :: r_runs = true
        :: r_domain = false
        fi;
        timeout
    :: s_domain && !s_runs && !r_domain ->
        assert(xs_over && s_journal == DECIDING);
        s_runs = true;      /* and here at the source: no daemon finds out whether it ran there */
        timeout
    :: else -> skip
    fi;
    assert(s_runs + r_runs == 1);
    assert(s_over && !s_maps && !k_maps);
    assert(!s_runs || (s_domain && r_journal == NONE && (!r_domain || xd_killed)));
    assert(!r_runs || (r_domain && !s_domain));
    assert(!r_runs || r_page || (r_journal == LOST && both_killed));
    assert(!r_runs || r_journal == NONE || r_journal == FINISHING || r_journal == LOST)
}

ltl one_owner { [] !(s_runs && r_runs) }
ltl no_page_is_lost { [] (PAGE_IS_HERE || r_page || both_killed) }
