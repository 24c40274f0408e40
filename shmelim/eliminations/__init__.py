"""The domain: elimination records, their store, the server that publishes them and the reader.

Its public names are those of :mod:`shmelim`. Nothing is imported here, so that a reader loads only what it needs.
"""
