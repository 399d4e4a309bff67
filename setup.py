"""Extensions and build switches only; all metadata is in pyproject.toml.

OPSQUEUE_DEBUG=1 compiles with bounds checks, assertions and debug symbols, without optimisation.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("OPSQUEUE_DEBUG", "") not in ("", "0")

extensions = [
    Extension(
        f"opsqueue._speedups.{source.stem}",
        [str(source)],
        extra_compile_args=["-O0", "-g"] if DEBUG else ["-O2", "-g1", "-fno-plt"],
    )
    for source in sorted(Path("opsqueue/_speedups").glob("*.pyx"))
]

setup(
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        extensions,
        language_level=3,
        compiler_directives={
            "boundscheck": DEBUG,
            "wraparound": DEBUG,
            "initializedcheck": DEBUG,
            "cdivision": True,
            "embedsignature": True,
        },
    ),
)
