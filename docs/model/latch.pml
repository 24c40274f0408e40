/* The seqcount latch of shmelim/shm on a weakly ordered machine. README.md says what stands for what.
 *
 * One writer at a time, READERS readers, TX transactions, CRASHES deaths of a writer at any step, GENS data segments.
 * A transaction adds one to the two words of the table: word = word + 1, so that a copy that missed one shows it. */

#ifndef READERS
#define READERS 2
#endif
#ifndef TX
#define TX 2
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef GENS
#define GENS 2
#endif

#include "properties.pml"

/* ---------------------------------------------------------------- shared memory */

#define VERSION		0
#define ACK		1		/* what callers were told: a message, delayed like any plain store */
#define LINK(g)		(2 + (g))	/* name of a segment: 0 gone, 1 without its header yet, 2 can be attached */
#define DATA(g, c, w)	(2 + GENS + 4 * (g) + 2 * (c) + (w))
#define SIZE		(2 + 5 * GENS)

#define MAKE(g, s)	((g) * 32 + (s))
#define GEN(v)		((v) / 32)
#define SEQ(v)		((v) % 32)
#define COPY(v)		((v) & 1)

byte mem[SIZE];			/* all zeros but for one name (see init): state 0 is published in generation 0 */

/* What no process looks at, only the assertions. */
byte committed;				/* transactions in the store */
byte state_of[TX + CRASHES + 1];	/* the state published with each sequence number */
byte seen;				/* the newest state that any finished read returned */

bool crash;
byte deaths;

#ifdef NO_RELEASE_STORE
#define IS_RELEASE(address)	false
#else
#define IS_RELEASE(address)	((address) == VERSION)
#endif

#include "stores.pml"

/* ---------------------------------------------------------------- what happens to the others */

proctype Fate()
{
end:	do
	:: d_step { AWAKE && deaths < CRASHES -> crash = true; deaths++ }
#ifdef ALONE
	:: d_step { AWAKE && !paused -> paused = true; alone = 1 }
#endif
	od
}

/* ---------------------------------------------------------------- the writer and its successors */

#define IN_PLACE	0
#define GROW		1
#define LOAD		2

inline acknowledge()
{
	if
	:: AWAKE && kind != LOAD -> store(ACK, state_of[SEQ(now)])
	:: AWAKE && kind == LOAD
	fi
}

/* Bring both words of a copy to a value. */
inline write_copy(g, c, value)
{
	store(DATA(g, c, 0), value);
	store(DATA(g, c, 1), value)
}

#define MAY_GROW	(GEN(now) + 1 + CRASHES - deaths < GENS)

proctype Writer()
{
	byte now;			/* the version word as this writer knows it */
	byte old;
	byte kind;
	byte holds[2];			/* what each copy of the current segment holds, or will */

life:	{
end:	do
#ifdef ADOPT
	/* A successor may go on where the table lies, if that is its store's latest state. What the other copy holds, it
	 * makes anew before anything else: the dead writer may have got half-way with it. */
	:: atomic {
#ifdef NO_COMPARE
		AWAKE && kind == LOAD ->
#else
		AWAKE && kind == LOAD && state_of[SEQ(mem[VERSION])] == committed ->
#endif
		now = mem[VERSION];
		kind = IN_PLACE;
		holds[COPY(now)] = mem[DATA(GEN(now), COPY(now), 0)];
#ifdef NO_REBUILD
		holds[1 - COPY(now)] = mem[DATA(GEN(now), 1 - COPY(now), 0)]
	   }
#else
		holds[1 - COPY(now)] = holds[COPY(now)]
	   };
	   write_copy(GEN(now), 1 - COPY(now), holds[1 - COPY(now)])
#endif
#endif
	:: atomic {
		/* A successor begins with load(): it looks at nothing of what it finds but the version word. */
		AWAKE && (kind == LOAD || committed < TX) ->
		if
		:: kind == LOAD -> now = mem[VERSION]
		:: kind != LOAD -> kind = IN_PLACE
		:: kind != LOAD && MAY_GROW -> kind = GROW
		fi;
		old = now;
		now = MAKE(GEN(old) + (kind != IN_PLACE), SEQ(old) + 1);
		state_of[SEQ(now)] = committed + (kind != LOAD);
		if
		:: kind == IN_PLACE -> holds[COPY(now)] = holds[COPY(now)] + 1
		:: kind == GROW -> holds[COPY(now)] = holds[COPY(old)] + 1
		:: kind == LOAD -> holds[COPY(now)] = committed
		fi;

		/* Stage. */
		if
		:: kind != IN_PLACE -> store(LINK(GEN(now)), 1)
		:: else -> goto stage
		fi
		};
		store(LINK(GEN(now)), 2);
stage:		write_copy(GEN(now), COPY(now), holds[COPY(now)]);
#ifdef ACKNOWLEDGE_FIRST
		acknowledge();
#endif

		/* Commit, or give up what is staged: then that copy is made equal to the current one again. */
		if
#ifdef PUBLISH_FIRST
		:: AWAKE
#else
		:: d_step { AWAKE -> committed = committed + (kind != LOAD) }
#endif
#ifndef NO_GIVE_UP
		:: atomic { AWAKE && kind == IN_PLACE -> holds[COPY(now)] = holds[COPY(old)]; now = old; goto settle }
#endif
		fi;

		/* Publish: the one store that readers follow. */
		store(VERSION, now);
#ifndef NO_RELEASE_FENCE
		release_fence();
#endif
#ifdef PUBLISH_FIRST
		d_step { AWAKE -> committed = committed + (kind != LOAD) };
#endif
		if
		:: atomic { AWAKE && kind != IN_PLACE -> store(LINK(GEN(old)), 0) }
		:: AWAKE && kind == IN_PLACE
		fi;
#ifndef ACKNOWLEDGE_FIRST
		acknowledge();
#endif
		/* Settle: the copy that readers left gets the same change, or mirrors the new one. */
		atomic {
			AWAKE ->
			if
			:: kind == IN_PLACE -> holds[COPY(old)] = holds[COPY(old)] + 1
			:: else -> holds[COPY(old)] = holds[COPY(now)]
			fi;
#ifdef NO_SETTLE
			holds[COPY(old)] = holds[COPY(old)] - (kind == IN_PLACE);
			goto done;
#endif
settle:			store(DATA(GEN(now), 1 - COPY(now), 0), holds[1 - COPY(now)])
		};
		atomic { store(DATA(GEN(now), 1 - COPY(now), 1), holds[1 - COPY(now)]);
done:			kind = IN_PLACE; old = 0 }
	od
	} unless { AWAKE && crash };

	/* Killed. Its pending stores drain, or from some moment on those that are left are lost; both before the kernel
	 * gives its lock to a successor. */
	atomic {
		AWAKE ->
		crash = false;
		kind = LOAD;
		now = 0; old = 0; holds[0] = 0; holds[1] = 0
	};
	if
	:: AWAKE && pending == 0
	:: d_step { AWAKE && pending > 0 -> forget_pending() }
	fi;
	goto life
}

/* ---------------------------------------------------------------- readers
 * The loads of one attempt are carried out in any order that its acquire load and its acquire fence leave: the version
 * before all others, the data before the second look at the version. An attempt that starts over has no memory of the
 * one before, so every attempt is held to what was acknowledged, or read by anybody, when *it* began. */

#define GOT_VERSION	1
#define GOT_FIRST	2
#define GOT_SECOND	4
#define GOT_AGAIN	8
#define GOT(x)		(got & (x))

#ifdef NO_ACQUIRE_LOAD
#define DATA_MAY_LOAD	(attached != NONE && (!GOT(GOT_VERSION) || GEN(version) == attached))
#define LOOK		guess
#else
#define DATA_MAY_LOAD	(GOT(GOT_VERSION) && GEN(version) == attached)
#define LOOK		COPY(version)
#endif

#ifdef X86
#define SECOND_MAY_LOAD	(DATA_MAY_LOAD && GOT(GOT_FIRST))
#else
#define SECOND_MAY_LOAD	DATA_MAY_LOAD
#endif

#ifdef NO_ACQUIRE_FENCE
#define AGAIN_MAY_LOAD	(GOT(GOT_VERSION) && GEN(version) == attached)
#else
#define AGAIN_MAY_LOAD	(GOT(GOT_VERSION) && GOT(GOT_FIRST) && GOT(GOT_SECOND))
#endif

#ifdef NO_RECHECK
#define ALL		(GOT_VERSION + GOT_FIRST + GOT_SECOND)
#define UNMOVED		true
#else
#define ALL		(GOT_VERSION + GOT_FIRST + GOT_SECOND + GOT_AGAIN)
#define UNMOVED		(again == version)
#endif

/* States that a model worth anything must reach: here the assertion has to fail. */
inline reached()
{
#ifdef REACH_SUCCESSOR
	assert(!(deaths > 0 && GEN(version) > 0 && first == TX))
#elif defined(REACH_UNACKNOWLEDGED)
	assert(!(first > mem[ACK] && deaths == CRASHES && pending == 0 && GEN(version) == 0))
#else
	skip
#endif
}

inline begin_attempt()
{
	if
	:: got == 0 ->
		least = mem[ACK];
		if
		:: seen > least -> least = seen
		:: else
		fi
	:: else
	fi
}

inline start_over()
{
	version = 0; again = 0; first = 0; second = 0; got = 0; least = 0;
#ifdef ALONE
	if
	:: alone == me -> tries++; FINISHES(tries <= MOST_TRIES)
	:: else
	fi
#endif
}

inline end_attempt()
{
	if
	:: got == ALL && UNMOVED ->
		WHOLE(first == second);				/* not torn */
		EXACT(first == state_of[SEQ(version)]);		/* all of that version's changes, and nothing else */
		DURABLE(first <= committed);
		CURRENT(first >= least);			/* no acknowledged change missing, never backwards */
		reached();
		if
		:: first > seen -> seen = first
		:: else
		fi;
		version = 0; again = 0; first = 0; second = 0; got = 0; least = 0;
#ifdef ALONE
		if
		:: alone == me -> alone = 0; tries = 0
		:: else
		fi
#endif
	:: got == ALL && !UNMOVED ->
		start_over()
	:: else
	fi
}

#define NONE 7

proctype Reader(byte me)
{
	byte attached = NONE;		/* the generation of the mapped segment */
	byte version, again, first, second, got, least;
#ifdef NO_ACQUIRE_LOAD
	byte guess;
#endif

	do
#ifdef NO_ACQUIRE_LOAD
	/* A load that runs ahead of the version's has guessed the copy; a wrong guess is found out and done again. */
	:: atomic { RUNS(me) && got == 0 -> guess = 1 - guess }
#endif
	:: d_step {
		RUNS(me) && !GOT(GOT_VERSION) ->
		begin_attempt();
		version = mem[VERSION];
#ifdef NO_ACQUIRE_LOAD
		if
		:: guess != COPY(version) -> guess = COPY(version); first = 0; second = 0; got = 0
		:: else
		fi;
#endif
		got = got | GOT_VERSION;
		end_attempt()
	   }
	:: d_step {
		RUNS(me) && DATA_MAY_LOAD && !GOT(GOT_FIRST) ->
		begin_attempt();
		first = mem[DATA(attached, LOOK, 0)];
		got = got | GOT_FIRST;
		end_attempt()
	   }
	:: d_step {
		RUNS(me) && SECOND_MAY_LOAD && !GOT(GOT_SECOND) ->
		begin_attempt();
		second = mem[DATA(attached, LOOK, 1)];
		got = got | GOT_SECOND;
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
	/* Another generation: attach its segment. One whose name is gone by now was left by the version word too;
	 * were it not, the reader would have to raise an error. */
	:: RUNS(me) && GOT(GOT_VERSION) && GEN(version) != attached ->
		if
		:: d_step { RUNS(me) && mem[LINK(GEN(version))] == 2 -> attached = GEN(version); start_over() }
		:: atomic { RUNS(me) && mem[LINK(GEN(version))] != 2 -> again = 255 };
		   d_step { RUNS(me) -> FOUND(mem[VERSION] != version); start_over() }
		fi
	od
}

/* ---------------------------------------------------------------- */

init
{
	atomic {
		mem[LINK(0)] = 2;
		run Machine();
		run Fate();
		run Writer();
		run Reader(1);
#if READERS > 1
		run Reader(2);
#endif
	}
}
