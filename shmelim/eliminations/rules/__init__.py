"""Who is eliminated, and what follows from it: run beside the validator's managers, in either mode.

``processor.py`` has the tick and its steps; ``perf_ledger.py``, ``challenge.py``, ``drawdown.py`` and
``zombies.py`` a rule each; ``closing.py`` and ``slashing.py`` what an elimination owes, ``expiry.py`` its end;
``deadlines.py`` how the validator's objects are called; ``loop.py`` the loop.
"""

from shmelim.eliminations.rules.processor import EliminationProcessor, processed
from shmelim.eliminations.rules.tick import Context

__all__ = ["Context", "EliminationProcessor", "processed"]
