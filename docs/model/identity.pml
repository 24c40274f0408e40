/* Whose segment it is: names and numbers come again, ids do not.
 *
 * Writer A publishes generation 1 and goes on to 2. At any moment all names are removed and A dies. Writer B takes the
 * name, and its generations are 1 and 2 as well. A reader of A may attach at any moment. Stores are seen at once: their
 * order is latch.pml's business. */

#include "properties.pml"

#define A		1
#define B		2
#define NOBODY		0

/* Reads of a dead writer's root until the name is looked at. */
#ifndef PATIENCE
#define PATIENCE	4
#endif

byte name;		/* the root that the name leads to */
byte version[3];	/* the generation that each root names; 0: nothing is published there */
byte data[3];		/* whose segment has the name of each generation */
bool dead, done;	/* A; B */

#define ALIVE		(!dead)

proctype WriterA()
{
	{
	name = A;
	data[1] = A;
	version[A] = 1;
	data[2] = A;
	version[A] = 2;
	data[1] = NOBODY;
end:	false
	} unless { dead }
}

proctype Remover()
{
	d_step { version[A] > 0 -> name = NOBODY; data[1] = NOBODY; data[2] = NOBODY; dead = true }
}

proctype WriterB()
{
	dead;
	data[1] = B;
	version[B] = 1;		/* a root gets its name with what is published in it */
	name = B;
	data[2] = B;		/* staged, and seen by nobody */
	version[B] = 2;
	data[1] = NOBODY;
	done = true
}

#define LEADS_ELSEWHERE	(name != NOBODY && name != root && version[name] > 0)

proctype Reader()
{
	byte root, attached, owner, now, stale;

	version[A] > 0;
	root = A;
end:	do
	:: atomic {
		now = version[root];
		if
		:: now == attached && attached > 0 ->
			/* An answer: from the segment that the root's version word means. */
			WHOLE(owner == root);
			if
			:: done && root == A -> stale++; FINISHES(stale <= PATIENCE)
			:: else
			fi
#ifdef REACH_OTHER
			;
			assert(root == A)
#endif
		:: else -> goto attach
		fi
	   };
#ifndef NO_LOOK
	   if
	   :: atomic { dead && root == A && LEADS_ELSEWHERE -> root = name; attached = 0; owner = NOBODY }
	   :: stale < PATIENCE || root != A
	   fi
#endif
	od;

attach:	/* Between the look at the version and the opening of the name anything may happen. */
	atomic {
		owner = data[now];
		if
#ifdef NO_ID
		:: owner != NOBODY -> attached = now
#else
		:: owner == root -> attached = now
#endif
		:: else ->
			/* Gone, or another root's: the name decides. An error where that leads nowhere. */
			attached = 0;
			if
			:: LEADS_ELSEWHERE -> root = name
			:: else
			fi;
			owner = NOBODY
		fi;
		now = 0
	};
	goto end
}

init
{
	atomic {
		run WriterA();
		run Remover();
		run WriterB();
		run Reader()
	}
}
