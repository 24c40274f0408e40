"""Generic command channel: authenticated request and reply over ``multiprocessing.connection``."""
