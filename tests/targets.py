"""What a channel serves in tests of its calls, its places and its end."""

import threading

from waiting import PATIENCE

from shmelim.channel import current_caller

KEY = b"0123456789abcdef0123456789abcdef"


class Target:
    def __init__(self):
        self.entered = threading.Event()
        self.release = threading.Event()
        self.server = None
        self.count = 0

    def echo_rpc(self, *args, **kwargs):
        return [list(args), kwargs]

    def hang_rpc(self):
        self.entered.set()
        assert self.release.wait(PATIENCE)
        return "done"

    def meet_rpc(self, barrier):
        self.barrier.wait(PATIENCE)
        return barrier

    def caller_rpc(self):
        caller = current_caller()
        return [caller.pid, caller.uid, caller.program]

    def grow_rpc(self, size):
        return "x" * size

    def fail_rpc(self, text):
        raise KeyError(text)

    def close_rpc(self):
        self.server.close()
        return "closing"
