"""The one part of the build that pyproject.toml can't describe: the CPU kernels, a plain shared library.

Optional: where there is no C++ compiler the install succeeds without it, and `qwenrun doctor` says so.
"""

from setuptools import Extension, setup

SOURCES = "kernels/cpu/csrc"
HEADERS = ("floats", "kernels", "matrix", "pool", "scratch", "tiles", "tiles_body")

setup(
    ext_modules=[
        Extension(
            "qwenrun.kernels.cpu._kernels",
            sources=[
                f"{SOURCES}/{name}.cpp" for name in ("fit", "kernels", "layer", "pool", "tiles_avx2", "tiles_avx512")
            ],
            depends=[f"{SOURCES}/{name}.h" for name in HEADERS],
            language="c++",
            # Instruction sets are chosen function by function, at run time: the library runs on any CPU.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
