"""Lets the site's API show each option of the functions that take ``**options``.

The site reads sources without running them; these signatures and descriptions are made from the
options' declaration when kvfold is imported (``kvfold.ops.signatures``).
"""

import inspect
from importlib import import_module
from operator import attrgetter
from typing import Any

from griffe import Extension, Function, Parameter, ParameterKind, Parameters

_MARK = "Unpack["


class DeclaredOptions(Extension):
    """Takes signature and docstring from the function itself."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        if not any(str(p.annotation).startswith(_MARK) for p in func.parameters):
            return
        module = func.module.path
        found = attrgetter(func.path.removeprefix(f"{module}."))(import_module(module))
        parameters = inspect.signature(found).parameters.values()
        func.parameters = Parameters(*map(_parameter, parameters))
        if func.docstring is not None and found.__doc__:
            func.docstring.value = inspect.cleandoc(found.__doc__)


def _parameter(given: inspect.Parameter) -> Parameter:
    default = None if given.default is given.empty else repr(given.default)
    return Parameter(given.name, kind=ParameterKind[given.kind.name.lower()], default=default)
