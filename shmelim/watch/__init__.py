"""Looking in from outside: what is seen of a name, as figures and as a page."""
