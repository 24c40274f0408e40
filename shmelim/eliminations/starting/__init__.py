"""Which state to begin from: the store, files that a person put there, or what is left when it is damaged."""
