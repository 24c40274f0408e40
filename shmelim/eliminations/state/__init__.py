"""What can be done to the state: each change one step of a transaction, committed and published in groups."""
