/* A machine that delays the writer's stores, and the pause in which one reader runs alone.
 *
 * Any store may overtake any other, with two exceptions: stores to one address stay in order, and a release store waits
 * for all that came before it. Nothing waits for a release store: what is issued behind it may overtake it, unless a
 * release fence stands between. With -DX86 stores become visible in the order in which they were issued, and there are
 * no release stores and no fences at all: what the pure-Python path has.
 *
 * Expects: mem[], IS_RELEASE(address). */

#ifndef ROOM
#define ROOM 5
#endif
byte where[5], what[5];
byte pending;

/* Only the reader of this number (from 1) takes steps; 0: everybody does. */
#ifdef ALONE
byte alone;
bool paused;
byte tries;
#ifndef MOST_TRIES
#define MOST_TRIES	2
#endif
#define AWAKE		(alone == 0)
#define RUNS(reader)	(alone == 0 || alone == (reader))
#else
#define AWAKE		true
#define RUNS(reader)	true
#endif

#ifdef X86
#define OVERTAKES(i)	false
#else
#define OVERTAKES(i)	(pending > (i) && !IS_RELEASE(where[i]))
#endif
#define GOES_0		(pending > 0)
#define GOES_1		(OVERTAKES(1) && where[1] != where[0])
#define GOES_2		(OVERTAKES(2) && where[2] != where[0] && where[2] != where[1])
#define GOES_3		(OVERTAKES(3) && where[3] != where[0] && where[3] != where[1] && where[3] != where[2])
#define GOES_4		(OVERTAKES(4) && where[4] != where[0] && where[4] != where[1] && where[4] != where[2] \
			 && where[4] != where[3])

inline store(address, value)
{
	d_step {
		AWAKE && pending < ROOM ->
		where[pending] = address;
		what[pending] = value;
		pending++
	}
}

/* Stopping here until nothing is pending shows readers the same as going on would: no store issued behind the fence
 * may be seen before those in front of it. */
inline release_fence()
{
#ifdef X86
	skip
#else
	AWAKE && pending == 0
#endif
}

inline forget_pending()
{
	pending = 0;
	where[0] = 0; where[1] = 0; where[2] = 0; where[3] = 0; where[4] = 0;
	what[0] = 0; what[1] = 0; what[2] = 0; what[3] = 0; what[4] = 0
}

hidden byte at;

inline becomes_visible(i)
{
	mem[where[i]] = what[i];
	at = i;
	do
	:: at < pending - 1 -> where[at] = where[at + 1]; what[at] = what[at + 1]; at++
	:: else -> break
	od;
	pending--;
	where[pending] = 0;
	what[pending] = 0
}

proctype Machine()
{
end:	do
	:: d_step { AWAKE && GOES_0 -> becomes_visible(0) }
	:: d_step { AWAKE && GOES_1 -> becomes_visible(1) }
	:: d_step { AWAKE && GOES_2 -> becomes_visible(2) }
	:: d_step { AWAKE && GOES_3 -> becomes_visible(3) }
	:: d_step { AWAKE && GOES_4 -> becomes_visible(4) }
	od
}
