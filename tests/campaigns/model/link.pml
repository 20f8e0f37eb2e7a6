/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the models share: a link that may be lost, and two processes that may be killed.  cuts and
 * kills: how often that still happens.
 */
chan to_r = [4] of { mtype };
chan to_s = [4] of { mtype };
bool link;                      /* messages arrive */
bool s_lost, r_lost;            /* the lanes of this end are lost */
bool r_fresh;                   /* a connection that the receiver has not taken yet */
bool s_dead, r_dead;
byte cuts = CUTS, kills = KILLS;

inline cut() {
    link = false; s_lost = true; r_lost = true; r_fresh = false;
    do
    :: nempty(to_r) -> to_r?_
    :: nempty(to_s) -> to_s?_
    :: empty(to_r) && empty(to_s) -> break
    od;
    skip
}

/* A connection with a token that is valid for it.  A receiver that has older lanes closes them. */
inline connect() { d_step { cut(); link = true; s_lost = false; r_lost = true; r_fresh = true } }

inline s_says(what) {
    d_step { if :: link && !s_lost -> assert(nfull(to_r)); to_r!what :: else -> skip fi }
}
inline r_says(what) {
    d_step { if :: link && !r_lost -> assert(nfull(to_s)); to_s!what :: else -> skip fi }
}

inline r_takes_connection() { d_step { r_fresh -> r_fresh = false; r_lost = false } }
