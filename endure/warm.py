"""Imported before any test process is forked, so that none of them waits for it."""

from fastrobust import memory, models, plan, progress, run  # noqa: F401
from fastrobust.models import torchvision_compat  # noqa: F401
