"""What is done in a forked child, before anything else runs there."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

from crashing import call

from shmelim.system import forks


class Owner:
    """Notes that it was told, or fails."""

    def __init__(self, *, fails):
        self.fails = fails
        self.told = False
        forks.register(self)

    def after_fork_in_child(self):
        if self.fails:
            raise AttributeError("not as it should be")
        self.told = True


def test_one_owner_that_fails_keeps_no_other_from_closing_its_descriptors():
    owners = [Owner(fails=bool(number % 2)) for number in range(20)]
    assert call(lambda: [owner.told for owner in owners]) == [True, False] * 10
    assert not any(owner.told for owner in owners)


def test_locks_of_logs_are_taken_in_the_order_in_which_a_fork_takes_them():
    """Else a thread that has those of the logs, and one that forks already, wait for each other for ever."""
    with ThreadPoolExecutor(1) as elsewhere, forks.logs_at_rest():
        assert not elsewhere.submit(lambda: forks.creating_descriptors.acquire(blocking=False)).result(60)


def test_a_child_that_is_forked_while_logs_rest_may_create_descriptors_in_any_thread():
    def child():
        with ThreadPoolExecutor(1) as elsewhere:
            return elsewhere.submit(lambda: forks.creating_descriptors.acquire(blocking=False)).result(60)

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(child()))
    with forks.logs_at_rest():
        process.start()
    assert here.poll(60)
    assert here.recv()
    process.join()
