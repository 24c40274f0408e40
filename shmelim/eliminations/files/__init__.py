"""The JSON files beside the state: written behind it, imported once, and what it is restored from."""
