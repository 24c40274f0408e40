"""Generic shared-memory table: bytes keys to (flags, record bytes), one writer, lock-free readers."""
