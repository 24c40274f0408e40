"""The one part of the build that is no metadata: the compiled read path, which may be left out.

``SHMELIM_BUILD=pure`` leaves it out, ``SHMELIM_BUILD=native`` makes a failure to compile it fatal. Without either,
a failure is reported and the package installs without it; it reads in pure Python then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_BUILD = os.environ.get("SHMELIM_BUILD", "")
_CHOICES = ("", "native", "pure")
_WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]


class BuildExtension(build_ext):
    """Builds the extension; says what became of it."""

    def build_extension(self, ext: Extension) -> None:
        """Build it, or say that it could not be built."""
        if not (self.inplace or self.editable_mode):  # who develops it wants symbols, who installs it does not
            ext.extra_compile_args.append("-g0")
            ext.extra_link_args.append("-Wl,-s")
        try:
            super().build_extension(ext)
        except Exception as error:
            if _BUILD == "native":
                raise
            print(  # noqa: T201  # what an installer shows of a build is its output
                f"shmelim: WARNING: the compiled read path could not be built ({error}). Installing without "
                "it: the pure-Python path does the same, more slowly. With SHMELIM_BUILD=native this is an error.",
                file=sys.stderr,
            )


if _BUILD not in _CHOICES:
    raise SystemExit(f"SHMELIM_BUILD={_BUILD!r} must be one of {', '.join(map(repr, _CHOICES))}")

setup(
    cmdclass={"build_ext": BuildExtension},
    ext_modules=[]
    if _BUILD == "pure"
    else [
        Extension(
            "shmelim.shm._native",
            ["shmelim/shm/_native.c"],
            depends=sorted(str(header) for header in Path("shmelim/shm").glob("*.h")),
            extra_compile_args=["-std=c11", "-O3", "-fvisibility=hidden", *_WARNINGS],
            optional=_BUILD != "native",
        )
    ],
)
