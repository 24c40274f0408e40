"""What is done in a forked child, before anything else runs there."""

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
