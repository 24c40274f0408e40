/* The snapshot of shmelim/shm: a copy of an append-only log that outlasts any number of publishes.
 *
 * Each copy of the table has an epoch, a mark (`used`) and a log. Transaction n appends the entry n; a compaction moves
 * the epoch and then writes the log over from its start, with the entry n - 1 standing for all that was live. So the log
 * of every version is known exactly, and a snapshot is held to all of it. A successor is not needed here: it never
 * writes in a segment that it found (latch.pml). */

#ifndef TX
#define TX 4
#endif
#ifndef GIVE_UPS
#define GIVE_UPS 0
#endif
#ifndef LENGTH
#define LENGTH 3
#endif

#include "properties.pml"

#define VERSION		0
#define EPOCH(c)	(1 + (c))
#define USED(c)		(3 + (c))
#define LOG(c, i)	(5 + LENGTH * (c) + (i))

#define COPY(v)		((v) & 1)

byte mem[5 + 2 * LENGTH];

/* What only the assertions look at, for each version: its newest entry and its oldest. */
byte newest_of[TX + 1], oldest_of[TX + 1];

#ifdef NO_RELEASE_STORE
#define IS_RELEASE(address)	false
#else
#define IS_RELEASE(address)	((address) == VERSION)
#endif
#include "stores.pml"

bool crash;

proctype Fate()
{
end:	do
	:: AWAKE && !crash -> crash = true
#ifdef ALONE
	:: d_step { AWAKE && !paused -> paused = true; alone = 1 }
#endif
	od
}

/* ---------------------------------------------------------------- writer */

inline begin_overwrite(c)
{
#ifndef NO_EPOCH
	epoch[c] = epoch[c] + 1;
	store(EPOCH(c), epoch[c]);
#endif
#ifndef NO_EPOCH_FENCE
	release_fence()
#else
	skip
#endif
}

proctype Writer()
{
	byte now;		/* the version, which is also the number of the last transaction that was published */
	byte oldest;		/* the first entry of the current log */
	byte used = 1;
	byte epoch[2];
	bool compact;
	byte gave_up;		/* bounded, since each time may move an epoch, and a byte must not come round */

	{
end:	do
	:: AWAKE && now < TX ->
		if
		:: AWAKE && used < LENGTH -> compact = false
		:: AWAKE && used > 1 -> compact = true
		fi;
		/* Stage. */
		if
		:: compact ->
			begin_overwrite(1 - COPY(now));
			store(LOG(1 - COPY(now), 0), now);
			store(LOG(1 - COPY(now), 1), now + 1);
			store(USED(1 - COPY(now)), 2)
		:: else ->
			store(LOG(1 - COPY(now), used), now + 1);
			store(USED(1 - COPY(now)), used + 1)
		fi;
		/* Publish, or give up: what was appended stays behind the mark, a compacted copy is mirrored again. */
		if
		:: atomic {
			AWAKE ->
			oldest = (compact -> now : oldest);
			used = (compact -> 2 : used + 1);
			now++;
			newest_of[now] = now;
			oldest_of[now] = oldest;
			store(VERSION, now)
		   }
		:: atomic { AWAKE && gave_up < GIVE_UPS -> gave_up++ }; goto settle
		fi;
#ifndef NO_RELEASE_FENCE
		release_fence();
#endif
settle:		if
		:: compact ->
			begin_overwrite(1 - COPY(now));
			store(LOG(1 - COPY(now), 0), oldest);
			if
			:: used > 1 -> store(LOG(1 - COPY(now), 1), oldest + 1)
			:: else
			fi;
			if
			:: used > 2 -> store(LOG(1 - COPY(now), 2), oldest + 2)
			:: else
			fi
		:: else ->
			store(LOG(1 - COPY(now), used - 1), now)
		fi;
		store(USED(1 - COPY(now)), used);
		compact = false
	od
	} unless { AWAKE && crash };
	/* Killed: what is pending drains, or from some moment on is lost. */
	if
	:: AWAKE && pending == 0
	:: d_step { AWAKE && pending > 0 -> forget_pending() }
	fi
}

/* ---------------------------------------------------------------- reader
 * Orders that an acquire load and two acquire fences leave: the version before everything; epoch and mark before the
 * second look at the version and before the log; the log before the second look at the epoch. */

#define GOT_VERSION	1
#define GOT_EPOCH	2
#define GOT_USED	4
#define GOT_AGAIN	8
#define GOT_LATER	128
#define GOT_ENTRY(i)	(16 << (i))
#define ENTRIES		((used > 0) * 16 + (used > 1) * 32 + (used > 2) * 64)

#define HEADER		(GOT_VERSION + GOT_EPOCH + GOT_USED)
#define GOT(x)		((got & (x)) == (x))

#if defined(NO_ACQUIRE_FENCE)
#define AGAIN_MAY_LOAD	GOT(GOT_VERSION)
#else
#define AGAIN_MAY_LOAD	GOT(HEADER)
#endif

#if defined(X86)
#define USED_MAY_LOAD	GOT(GOT_VERSION + GOT_EPOCH)
#define LOG_MAY_LOAD(i)	(GOT(HEADER + GOT_AGAIN) && ((i) == 0 || GOT(GOT_ENTRY((i) - 1))))
#elif defined(NO_ACQUIRE_FENCE)
#define USED_MAY_LOAD	GOT(GOT_VERSION)
#define LOG_MAY_LOAD(i)	GOT(GOT_VERSION + GOT_USED)
#else
#define USED_MAY_LOAD	GOT(GOT_VERSION)
#define LOG_MAY_LOAD(i)	GOT(HEADER)
#endif

#ifdef NO_RECHECK
#define UNMOVED		true
#define RECHECKED	0
#else
#define UNMOVED		(again == version)
#define RECHECKED	GOT_AGAIN
#endif

#if defined(NO_EPOCH_CHECK)
#define SAME_LOG	true
#define LATER_MAY_LOAD	false
#define EPOCH_CHECKED	0
#elif defined(NO_LOG_FENCE)
#define SAME_LOG	(later == epoch)
#define LATER_MAY_LOAD	GOT(HEADER)
#define EPOCH_CHECKED	GOT_LATER
#else
#define SAME_LOG	(later == epoch)
#define LATER_MAY_LOAD	GOT(HEADER + ENTRIES + RECHECKED)
#define EPOCH_CHECKED	GOT_LATER
#endif

inline forget()
{
	version = 0; epoch = 0; used = 0; again = 0; later = 0; got = 0; wrong = false
}

inline end_attempt()
{
	if
	:: GOT(HEADER + RECHECKED) && !UNMOVED ->
		forget();
#ifdef ALONE
		if
		:: alone == me -> tries++; FINISHES(tries <= MOST_TRIES)
		:: else
		fi
#endif
	:: GOT(HEADER + RECHECKED + ENTRIES + EPOCH_CHECKED) && UNMOVED && !SAME_LOG ->
		forget();
#ifdef ALONE
		if
		:: alone == me -> tries++; FINISHES(tries <= MOST_TRIES)
		:: else
		fi
#endif
	:: GOT(HEADER + RECHECKED + ENTRIES + EPOCH_CHECKED) && UNMOVED && SAME_LOG ->
#ifdef REACH_OVERTAKEN
		assert(mem[VERSION] < version + 2);
#endif
		WHOLE(used == newest_of[version] - oldest_of[version] + 1);
		WHOLE(!wrong);
		forget();
#ifdef ALONE
		if
		:: alone == me -> alone = 0; tries = 0
		:: else
		fi
#endif
	:: else
	fi
}

inline load_entry(i)
{
	RUNS(me) && LOG_MAY_LOAD(i) && used > i && !GOT(GOT_ENTRY(i)) ->
	wrong = wrong || mem[LOG(COPY(version), i)] != oldest_of[version] + i;
	got = got | GOT_ENTRY(i);
	end_attempt()
}

proctype Reader(byte me)
{
	byte version, epoch, used, again, later, got;
	bool wrong;		/* an entry is not the one that the log of this version has there */

	do
	:: d_step {
		RUNS(me) && !GOT(GOT_VERSION) ->
		version = mem[VERSION];
		got = got | GOT_VERSION
	   }
	:: d_step {
		RUNS(me) && GOT(GOT_VERSION) && !GOT(GOT_EPOCH) ->
		epoch = mem[EPOCH(COPY(version))];
		got = got | GOT_EPOCH;
		end_attempt()
	   }
	:: d_step {
		RUNS(me) && USED_MAY_LOAD && !GOT(GOT_USED) ->
		used = mem[USED(COPY(version))];
		got = got | GOT_USED;
		end_attempt()
	   }
#ifndef NO_RECHECK
	:: d_step {
		RUNS(me) && AGAIN_MAY_LOAD && !GOT(GOT_AGAIN) ->
		again = mem[VERSION];
		got = got | GOT_AGAIN;
		end_attempt()
	   }
#endif
	:: d_step { load_entry(0) }
	:: d_step { load_entry(1) }
	:: d_step { load_entry(2) }
#ifndef NO_EPOCH_CHECK
	:: d_step {
		RUNS(me) && LATER_MAY_LOAD && !GOT(GOT_LATER) ->
		later = mem[EPOCH(COPY(version))];
		got = got | GOT_LATER;
		end_attempt()
	   }
#endif
	od
}

init
{
	atomic {
		mem[USED(0)] = 1;
		mem[USED(1)] = 1;
		run Machine();
		run Fate();
		run Writer();
		run Reader(1);
	}
}
