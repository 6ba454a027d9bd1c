"""Permutation debiasing of language models, and its distillation into compact students. The modules are the interface;
:class:`permdistill.students.Student` is at hand as ``permdistill.Student``, :func:`permdistill.measure.explore.explore` as
``permdistill.explore``."""

from importlib import import_module
from typing import Any

from permdistill import _moved as _moved

# Loaded when asked for: torch takes seconds.
_LAZY = {"Student": "permdistill.students", "explore": "permdistill.measure.explore"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'permdistill' has no attribute {name!r}")
