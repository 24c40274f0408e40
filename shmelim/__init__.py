"""shmelim: is this hotkey eliminated? Answered from shared memory, in any process."""
