/* The promises. With -DONLY=<one of these names> the others are not looked at, so that a negative control shows the
 * very thing that goes wrong. */

#define EVERYTHING	0
#define IS_WHOLE	1	/* P2: never torn */
#define IS_EXACT	2	/* P2: the state of its version, and of no other */
#define IS_DURABLE	3	/* P5: nothing is visible that a power cut could undo */
#define IS_CURRENT	4	/* P4, P5: every acknowledged change, and never an older state than anybody has read */
#define IS_FOUND	5	/* P3: no reader gets an error because a segment went away */
#define IS_FINISHED	6	/* P1, P3: a reader that runs alone is done after a few attempts */

#ifndef ONLY
#define ONLY EVERYTHING
#endif

#define HOLDS(name, x)	assert((x) || (ONLY != EVERYTHING && ONLY != name))

#define WHOLE(x)	HOLDS(IS_WHOLE, x)
#define EXACT(x)	HOLDS(IS_EXACT, x)
#define DURABLE(x)	HOLDS(IS_DURABLE, x)
#define CURRENT(x)	HOLDS(IS_CURRENT, x)
#define FOUND(x)	HOLDS(IS_FOUND, x)
#define FINISHES(x)	HOLDS(IS_FINISHED, x)
