"""The state of record: SQLite, its tables, and the history of every change."""
