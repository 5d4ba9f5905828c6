"""Build settings live in pyproject.toml; this file lets `python setup.py` and old tools find them."""

from setuptools import setup

setup()
