"""Only what pyproject.toml cannot say: the native modules, compiled by cffi at install."""

from setuptools import setup

setup(
    cffi_modules=[
        "xenbackend/native/build_ring.py:ffi",
        "xenbackend/simulated/native/build_sim.py:ffi",
    ]
)
