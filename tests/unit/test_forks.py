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


def test_who_is_about_to_fork_holds_nothing_that_another_fork_waits_for():
    """That one has locks of others already, which this one's fork takes first: they would wait for each other."""
    with ThreadPoolExecutor(1) as elsewhere, forks.logs_at_rest():
        assert elsewhere.submit(
            lambda: forks.creating_descriptors.acquire(blocking=False) and not forks.creating_descriptors.release()
        ).result(60)


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
