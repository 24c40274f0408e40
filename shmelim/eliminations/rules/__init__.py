"""Who is eliminated, and what follows from it: run beside the validator's managers, in either mode.

``processor.py`` has the tick and the short rules, ``challenge.py`` and ``judging.py`` the long ones;
``settling.py``, ``flattening.py`` and ``slashing.py`` what an elimination owes; ``expiry.py`` its end; ``loop.py``
the loop.
"""

from shmelim.eliminations.rules.iteration import Context
from shmelim.eliminations.rules.processor import EliminationProcessor, processed

__all__ = ["Context", "EliminationProcessor", "processed"]
