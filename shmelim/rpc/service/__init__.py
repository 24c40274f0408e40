"""The life of a service: its server process, restarts, health checks, and every process' way to it."""
