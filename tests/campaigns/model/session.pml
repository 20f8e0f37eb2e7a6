/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The handover and what follows it, between a sender and a receiver that may each be killed, over a
 * link that may be lost.
 *
 * An operator may decide once, while the link is down, that the guest continues at the source: the
 * destination then stops it.
 *
 * One page stands for all that are missing.  The memory of a process is lost when the process is
 * killed; the journal and the domains stay.  Every step between two of these is a step of the
 * model, so a kill may fall between any two.
 *
 * toolstack.pml is the same under xl, which decides.
 *
 * Checked (tests/campaigns/model/check.py): the assertions, in every state; that no state is a dead
 * end; and that, when nothing can happen any more, the guest runs in exactly one place, with its
 * page, and nothing is left over.  With MUTATION defined one of the rules is broken, and the checks
 * must notice.
 */
#ifndef CUTS
#define CUTS 3
#endif
#ifndef KILLS
#define KILLS 3
#endif
#ifndef MUTATION
#define MUTATION 0
#endif

#define NO_JOURNAL_BEFORE_HANDOVER   1
#define START_BEFORE_HANDOVER        2
#define RESUME_AFTER_HANDOVER        3
#define LET_GO_BEFORE_ACKNOWLEDGED   4
#define NOT_SENT_AGAIN               5
#define NOT_TOLD_OF_GIVING_UP        6
#define LOADS_A_SECOND_COPY          7
#define FORGETS_READY                8
#define SILENT_BEFORE_CONTEXT        9
#define BELIEVES_AN_ABORT_ARRIVED   10
#define ABORTS_WHAT_WAS_HANDED_OVER 11
#define ANSWERS_BEFORE_HELD_IS_NOTED 12
#define SUCCESSOR_LETS_HELD_RUN     13
#define FORGETS_TO_RECALL           14
#define HOLDS_NOTHING_THAT_IS_WHOLE 15

mtype = { suspended, context, ready, handover, page, loaded, complete, completed, abort, rejoin,
          at_ready, at_own, refused, recall };
/* journals */
mtype = { NONE, BEGUN, HANDED, GIVEN_UP, DECIDED, RECALLING, MADE, READY, OWN, FINISHING, HELD };

#include "link.pml"

/* What outlives a process. */
mtype s_journal = NONE, r_journal = NONE;
bool s_runs = true;             /* the guest runs at the source */
bool r_runs;                    /* the guest runs at the destination */
bool s_page = true;             /* the source's domain, with its page, is there */
bool r_domain, r_page;
bool r_wrote;                   /* the guest has written to its page at the destination */
bool s_over, r_over;            /* nothing is left to do */
bool decided;                   /* an operator has decided for the source, rightly or wrongly */

/* ---- the sender ---- */
inline give_up() {
    s_says(abort);
    s_runs = true;
#if MUTATION == NOT_TOLD_OF_GIVING_UP
    settled()
#else
    s_journal = GIVEN_UP
#endif
}

inline settled() { d_step { s_journal = NONE; s_over = true } }

inline let_go() { s_page = false; settled(); s_says(completed) }

inline push() {
    s_says(page);
    if
    :: s_says(page)     /* a vCPU asked for it while it was on its way */
    :: true
    fi
}

inline feed() {
    do
    :: to_s?loaded -> skip
    :: to_s?complete -> let_go(); break
    :: s_lost -> break
    od
}

inline migrate() {
    s_journal = BEGUN;
    connect();
    s_runs = false;
    s_says(suspended);
#if MUTATION == SILENT_BEFORE_CONTEXT
    if
    :: s_lost -> s_runs = true; settled(); goto next
    :: else -> skip
    fi;
#endif
    s_says(context);
    if
    :: to_s?ready ->
#if MUTATION != NO_JOURNAL_BEFORE_HANDOVER
        s_journal = HANDED;
#endif
        s_says(handover);
        push();
#if MUTATION == NO_JOURNAL_BEFORE_HANDOVER
        s_journal = HANDED;
#endif
#if MUTATION == LET_GO_BEFORE_ACKNOWLEDGED
        s_page = false;
#endif
        feed()
    :: s_lost -> give_up()
    :: true -> give_up()        /* cancelled, or the receiver has failed */
    fi
}

inline take_up_again() {
    connect();
    s_says(rejoin);
    if
    :: to_s?at_ready -> s_says(handover); push(); feed()
    :: to_s?at_own ->
#if MUTATION != NOT_SENT_AGAIN
        assert(s_page);
        push();
#endif
        feed()
    :: to_s?complete -> let_go()
    :: to_s?refused -> skip
    :: s_lost -> skip
    fi
}

/* "decide here": the guest may run at the receiver, which cannot be reached. */
inline decide() {
    s_runs = true;
#if MUTATION == FORGETS_TO_RECALL
    settled()
#else
    s_journal = RECALLING
#endif
}

inline tell() {
    connect();
#if MUTATION == ABORTS_WHAT_WAS_HANDED_OVER
    s_says(abort);
#else
    if
    :: s_journal == RECALLING -> s_says(recall)
    :: else -> s_says(abort)
    fi;
#endif
    if
    :: to_s?refused -> settled()        /* the receiver has no such session, or is informed */
#if MUTATION == BELIEVES_AN_ABORT_ARRIVED
    :: s_lost -> settled()
#else
    :: s_lost -> skip
#endif
    fi
}

active proctype Sender()
{
    do
    :: {
        do
        :: s_over -> (false)
        :: !s_over && s_journal == NONE -> migrate(); next: skip
        :: s_journal == BEGUN && s_runs -> give_up()
        :: s_journal == BEGUN && !s_runs -> give_up()
        :: s_journal == HANDED && !s_page -> settled()      /* killed in between */
        :: s_journal == HANDED && s_page ->
#if MUTATION == RESUME_AFTER_HANDOVER
            if :: give_up() :: take_up_again() fi
#else
            take_up_again()
#endif
        :: d_step {
            s_journal == HANDED && s_page && s_lost && !decided ->
            decided = true;
            s_journal = DECIDED
        }
        :: s_journal == DECIDED -> decide()
        :: s_journal == GIVEN_UP || s_journal == RECALLING -> tell()
        od
    } unless { s_dead -> d_step { s_dead = false; cut() } }
    od
}

/* ---- the receiver ---- */
inline discard() { r_domain = false; r_journal = NONE }

inline own() {
    r_journal = OWN;
    r_runs = true
}

/* The guest runs at the source as well, and is paused here until an operator decides again. */
inline hold() {
#if MUTATION == ANSWERS_BEFORE_HELD_IS_NOTED
    r_says(refused);
#endif
    r_journal = HELD;
    r_runs = false;
    r_says(refused)
}

/* The page has arrived, for the first time or again. */
inline load() {
    if
    :: !r_page -> r_page = true
    :: else ->
#if MUTATION == LOADS_A_SECOND_COPY
        assert(!r_wrote);
#endif
        skip
    fi;
    r_wrote = true
}

inline prepare() {
    r_journal = MADE;
    r_domain = true;
#if MUTATION == START_BEFORE_HANDOVER
    own();
#endif
#if MUTATION != FORGETS_READY
    r_journal = READY
#endif
}

active proctype Receiver()
{
    mtype heard;
    bool said_ready;

    do
    :: {
        said_ready = false;
        if  /* the journal shows at which step it was killed */
        :: r_journal == MADE -> discard()
        :: r_journal == READY -> said_ready = true     /* it may have been sent */
        :: r_journal == OWN && !r_runs -> r_runs = true
#if MUTATION != SUCCESSOR_LETS_HELD_RUN
        :: r_journal == HELD && r_runs -> r_runs = false
#endif
        :: else -> skip
        fi;
        do
        :: r_fresh -> r_takes_connection()
        :: r_lost && !r_fresh && (r_journal == MADE || (r_journal == READY && !said_ready)) ->
            discard()
        :: r_lost && !r_fresh && r_journal == OWN && r_page ->
            r_journal = FINISHING                       /* the ring is given up */
        :: d_step { !r_lost && nempty(to_r) -> to_r?heard };
            if
            :: heard == suspended && r_journal == NONE -> prepare()
            :: heard == context && r_domain && !said_ready -> said_ready = true; r_says(ready)
            :: heard == handover && r_journal == READY -> own()
            :: heard == abort ->
                assert(r_journal != OWN && r_journal != FINISHING);
                if :: r_domain -> discard() :: else -> skip fi;
                r_says(refused)
            :: heard == recall && r_journal == OWN -> hold()
#if MUTATION != HOLDS_NOTHING_THAT_IS_WHOLE
            :: heard == recall && r_journal == FINISHING -> hold()
#endif
            :: heard == recall && r_journal == READY -> discard(); r_says(refused)
            :: heard == page && r_journal == OWN -> load(); r_says(loaded); r_says(complete)
            :: heard == rejoin && r_journal == READY -> r_says(at_ready)
            :: heard == rejoin && r_journal == OWN && !r_page -> r_says(at_own)
            :: heard == rejoin && r_journal == OWN && r_page -> r_says(complete)
            :: heard == rejoin && r_journal == FINISHING -> r_says(complete)
            :: heard == completed -> r_journal = NONE; r_over = true
            :: else -> r_says(refused)
            fi
        od
    } unless { r_dead -> d_step { r_dead = false; cut() } }
    od
}

/* ---- the faults ---- */
active proctype Faults()
{
    do
    :: d_step { cuts > 0 && link -> cuts--; cut() }
    :: d_step { kills > 0 -> kills--; s_dead = true }
    :: d_step { kills > 0 -> kills--; r_dead = true }
    :: cuts == 0 && kills == 0 -> break
    :: break
    od
}

active proctype Watch()
{
    /* Nothing can happen any more. */
    timeout ->
    assert(s_runs + r_runs == 1);
    assert(!r_runs || r_page);
    assert(!r_runs || !s_page);
    assert(!s_runs || (s_page && (!r_domain || r_journal == HELD)));
    assert(s_over)
}

ltl one_owner { [] (decided || !(s_runs && r_runs)) }
ltl no_page_is_lost { [] (s_page || r_page) }
