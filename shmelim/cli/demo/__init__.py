"""``shmelim demo``: the whole job in one command, measured under the eyes of readers that never pause."""
