/* The fenced cutover and its recovery, for SPIN (https://spinroot.com).
 *
 *   spin -a cutover.pml && cc -DSAFETY -o pan pan.c && ./pan -E     checks the protocol: no errors
 *   spin -a -DMUTANT_… cutover.pml && …                             a way to get it wrong: an assertion fails
 *
 * The code is cutover/protocol.py over mover/sql/fence.sql; states and steps carry the same names. A process that
 * is not scheduled again has died, and one that is scheduled after others have taken over is a zombie, so a crash
 * between any two steps needs no step of its own. For the same reason a state in which nobody can go on is no error
 * (-E): the last owner has died, and the next one is missing.
 *
 * Invariants, as assertions where they could break:
 *   at most one side accepts the tenant's writes, and every acknowledged write is at the side that does;
 *   switched implies drained and the fence held;  it is decided once;
 *   the source may forget only what the target has flushed;  the way back misses no write.
 * That rows are equal is not in the model: it knows how many of the source's writes have arrived, not what they say. */

#define WRITERS 2
#define WRITES 1        /* by each */
#ifndef OWNERS
#define OWNERS 2        /* of the migration, one after the other; with 3 it takes half a minute and 2 GB */
#endif

mtype = { open, closed, aborted, moved, source, target };

mtype source_fence = open, target_fence = closed;
mtype route = source;
byte claim = 1;                                  /* the owner's epoch, as the platform knows it … */
byte source_owner = 1, target_owner = 1;         /* … and as each place does */
byte sharing, holder;                            /* the tenant's lock: writers, and the epoch that holds it alone */
byte committed, applied, flushed, confirmed;     /* so many of the source's writes */
byte decisions;
bool target_has_served, reverse_stands;

/* An application's writer, whose route may be stale. The guard: the lock first, the state under it. */
active [WRITERS] proctype writer() {
    byte written;
    mtype at;
    do
    :: written == WRITES -> break
    :: else ->
        at = route;
        if
        :: at == source ->
            atomic { holder == 0 -> sharing++ }
            if
            :: source_fence == open ->
                atomic {
                    assert(!target_has_served);
                    committed++; sharing--; written++
                }
            :: else -> sharing--                 /* refused, or told to retry */
            fi
        :: at == target ->
            if
            :: atomic { target_fence == open ->
                    assert(flushed == committed);
                    assert(reverse_stands);
                    target_has_served = true; written++ }
            :: else
            fi
        fi
    od
}

/* cut_over */
inline cut_over(e) {
    mark = 255;
#ifndef MUTANT_REVERSE_SLOT_AFTER_OPENING
    reverse_stands = true;
#endif
#ifdef MUTANT_POSITION_READ_BEFORE_THE_DRAIN
    mark = committed;
#endif
    if
    :: atomic { sharing == 0 && holder == 0 -> holder = e }
    :: goto done                                 /* writers did not end in time: nothing happened */
    fi;
    if
    :: atomic {
#ifndef MUTANT_CLOSING_WITHOUT_THE_LOCK
            holder == e &&
#endif
            source_owner == e && source_fence == open ->
                source_fence = closed;
                if :: mark == 255 -> mark = committed :: else fi }
    :: atomic { holder != e || source_owner != e || source_fence != open ->
            if :: holder == e -> holder = 0 :: else fi; goto done }
    fi;
    do
    :: target_owner != e -> goto done
    :: atomic { target_owner == e && applied < mark -> applied++ }
    :: atomic { target_owner == e && flushed < applied -> flushed = applied }
#ifdef MUTANT_ACKNOWLEDGED_BEFORE_THE_FLUSH
    :: atomic { target_owner == e && confirmed < applied -> confirmed = applied; assert(confirmed <= flushed) }
#else
    :: atomic { target_owner == e && confirmed < flushed -> confirmed = flushed; assert(confirmed <= flushed) }
#endif
    :: atomic { target_owner == e && flushed >= mark -> break }
    :: atomic { source_owner == e && source_fence == closed ->  /* the budget is spent, or the sides differ: undo */
            assert(target_fence != open); source_fence = open; holder = 0; goto done }
    od;
    if
    :: atomic { claim == e && route == source ->
            assert(source_fence == closed);
            assert(flushed == committed);
            route = target; decisions++; assert(decisions == 1) }
    :: claim != e -> goto done                   /* certainly not decided: the next owner settles it */
    fi;
    finish(e)
}

/* _finish: open the target, then tell the waiting writers */
inline finish(e) {
    if
    :: atomic { target_owner == e && target_fence != open -> target_fence = open }
    :: target_owner != e || target_fence == open
    fi;
#ifdef MUTANT_REVERSE_SLOT_AFTER_OPENING
    reverse_stands = true;
#endif
    if
    :: atomic { source_owner == e && (source_fence == closed || source_fence == moved) ->
            source_fence = moved; if :: holder == e -> holder = 0 :: else fi }
    :: source_owner != e
    fi
}

/* recover: the target's fence is asked first */
inline recover(e) {
    claim = e;
    target_owner = e;
    source_owner = e;
    is_open = false;
#ifdef MUTANT_ABORT_WITHOUT_COMPARE_AND_SWAP
    atomic { target_owner == e -> target_fence = aborted };
#else
#ifndef MUTANT_TARGET_FENCE_NOT_ASKED_FIRST
    if
    :: atomic { target_owner == e && target_fence == closed -> target_fence = aborted }
    :: atomic { target_owner == e && target_fence == open -> is_open = true }
    :: atomic { target_owner == e && target_fence == aborted }
    :: target_owner != e -> goto done
    fi;
#endif
#endif
    if
    :: is_open ->
        atomic { claim == e -> route = target }  /* "the target is open" is the decision */
        finish(e); goto done
    :: !is_open && claim == e && route == target -> finish(e); goto done
    :: !is_open && claim == e && route == source ->
        if
        :: atomic { source_owner == e && source_fence != open -> source_fence = open }
        :: source_owner != e -> goto done
        :: source_fence == open
        fi;
        if
        :: atomic { target_owner == e && target_fence == aborted -> target_fence = closed }
        :: else
        fi
    :: claim != e -> goto done
    fi
}

proctype owner(byte e) {
    byte mark;
    bool is_open;
    if
    :: e > 1 -> recover(e)
    :: else
    fi;
    if
    :: claim == e && route == source -> cut_over(e)
    :: else
    fi;
done:
    skip
}

/* Somebody takes the migration over, whatever the one before is doing. */
active proctype daemons() {
    byte e = 1;
    run owner(1);
    do
    :: e < OWNERS -> e++; run owner(e)
    :: break
    od
}

/* The holding session ends: its owner has died, or was frozen for longer than the budget. */
active proctype sessions() {
    do
    :: atomic { holder != 0 -> holder = 0 }
    :: break
    od
}

/* The target's server crashes, and the platform loses its last commit in a failover. */
active proctype failures() {
    if
    :: applied = flushed
    :: skip
    fi;
    if
    :: atomic { route == target && target_fence == open -> route = source; decisions = 0 }
    :: skip
    fi
}

#ifdef MUTANT_REOPENING_ON_A_TIMER
active proctype timer() {
    atomic { source_fence == closed && holder == 0 -> source_fence = open }
}
#endif

#ifdef MUTANT_TOMBSTONE_REMOVED_WITH_THE_CLEAN_UP
active proctype clean_up() {
    atomic { source_fence == moved -> source_fence = open }   /* nobody refuses any more */
}
#endif
