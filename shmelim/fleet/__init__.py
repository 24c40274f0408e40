"""Beyond one host: a publisher sends what changes through an engine, followers keep a table on their hosts."""
