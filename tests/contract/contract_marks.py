"""How the contract tests are marked and listed."""

import pytest


def not_built(line, raises=None, *, condition=True):
    """Mark a test of a line of SPEC.md that is not built yet; the mark goes once it is."""
    return pytest.mark.xfail(condition, strict=True, raises=raises, reason=f"{line}, not built yet")


def words(text):
    return text.split()
