/* What the latch is there to avoid: a seqlock, one copy under a version that is odd while it is being changed. Never
 * torn, but behind a writer that died in the middle of a change its readers start over for ever (-DALONE). */

#ifndef TX
#define TX 2
#endif

#include "properties.pml"

#define VERSION		0
#define DATA(w)		(1 + (w))

byte mem[3];

#define IS_RELEASE(address)	((address) == VERSION)
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

proctype Writer()
{
	byte done;

	{
	do
	:: AWAKE && done < TX ->
		done++;
		store(VERSION, 2 * done - 1);
		release_fence();
		store(DATA(0), done);
		store(DATA(1), done);
		store(VERSION, 2 * done)
	:: AWAKE && done == TX -> break
	od;
end_idle: false
	} unless { AWAKE && crash };
	/* Killed: what is pending drains. */
	skip
}

proctype Reader(byte me)
{
	byte version, first, second;

	do
	:: RUNS(me) -> version = mem[VERSION];
		if
		:: version % 2 == 0 ->
			if
			:: RUNS(me) -> first = mem[DATA(0)]; second = mem[DATA(1)]
			:: RUNS(me) -> second = mem[DATA(1)]; first = mem[DATA(0)]
			fi;
			if
			:: d_step {
				RUNS(me) && mem[VERSION] == version ->
				WHOLE(first == second);
				EXACT(2 * first == version);
#ifdef ALONE
				if
				:: alone == me -> alone = 0; tries = 0
				:: else
				fi
#endif
			   }
			   goto next
			:: RUNS(me) && mem[VERSION] != version
			fi
		:: else
		fi;
#ifdef ALONE
		d_step {
			if
			:: alone == me -> tries++; FINISHES(tries <= MOST_TRIES)
			:: else
			fi
		};
#endif
next:		atomic { version = 0; first = 0; second = 0 }
	od
}

init
{
	atomic {
		run Machine();
		run Fate();
		run Writer();
		run Reader(1);
	}
}
