"""Commands in this process, with what they print to stderr apart: click before 8.2 must be told so."""

import inspect

from click.testing import CliRunner as _CliRunner


def CliRunner(**options):  # noqa: N802  # in its place
    """Return click's runner, with these of its options."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(_CliRunner).parameters else {}
    return _CliRunner(**apart, **options)
