"""Old names of modules, as the README of version 0.1 showed them: still there, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {f"permdistill.{name}": f"permdistill.api.{name}" for name in ("endpoint", "jobs", "replies", "server")}
MOVED |= {
    "permdistill.blackbox": "permdistill.api.ask",
    "permdistill.data": "permdistill.questions",
    "permdistill.metrics": "permdistill.measure.metrics",
    "permdistill.tables": "permdistill.paper.tables",
}
COMMANDS = {"permdistill.tables": "permdistill.paper results"}


class _Finder:
    """Finds what no other finder does; a module that it loads hands on every name to the one in the new place."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        text = f"{module.__name__} is now {new}; the old name goes with the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        module.__getattr__ = partial(getattr, import_module(new))  # type: ignore[method-assign]

    def get_code(self, name: str) -> CodeType:
        """For ``python -m``: says where the command went, and exits with 2."""
        new = COMMANDS.get(name, MOVED[name])
        text = f"import sys; print('python -m {name} is now python -m {new}', file=sys.stderr); sys.exit(2)"
        return compile(text, name, "exec")


sys.meta_path.append(_Finder())
