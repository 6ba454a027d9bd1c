"""Permutation debiasing of language models, and its distillation into compact students. The modules are the interface;
:class:`permdistill.students.Student` is at hand as ``permdistill.Student``."""

from typing import Any

from permdistill import _moved as _moved


def __getattr__(name: str) -> Any:
    if name == "Student":  # loaded when asked for: torch takes seconds
        from permdistill.students import Student

        return Student
    raise AttributeError(f"module 'permdistill' has no attribute {name!r}")
