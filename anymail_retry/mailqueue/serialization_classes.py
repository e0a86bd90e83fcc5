"""Which class of Django's, Anymail's or Python's an object can be rebuilt as, and what its own class changes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Rebuilt(NamedTuple):
    """What remains of a class when its objects are rebuilt as ``base``."""

    base: type
    overridden: tuple[str, ...]  # methods of `base` that the class defines anew: they are lost
    added: tuple[str, ...]  # class attributes that hold data and that `base` does not have: they can be kept


@functools.lru_cache(maxsize=256)
def rebuilt_as(cls: type, known: tuple[type, ...]) -> Rebuilt | None:
    """The simplest of the known classes that has all that ``cls`` has of them; None if there is none.

    :param known: the classes that can be rebuilt, any that another extends before that other.
    """
    inherited = {ancestor for ancestor in cls.__mro__ if ancestor in known}
    base = next((one for one in known if inherited and inherited.issubset(one.__mro__)), None)
    if base is None:
        return None
    # A mixin listed after the known classes cannot override them, so it is left out.
    last = max(index for index, ancestor in enumerate(cls.__mro__) if ancestor in inherited)
    own = [ancestor for ancestor in cls.__mro__[:last] if ancestor not in base.__mro__]
    names = list(dict.fromkeys(name for ancestor in own for name in vars(ancestor)))
    return Rebuilt(
        base,
        overridden=overrides(names, base),
        added=tuple(n for n in names if not n.startswith("_") and not hasattr(base, n) and _is_data(cls, n)),
    )


def overrides(names: Iterable[str], base: type) -> tuple[str, ...]:
    """Those of the names that are methods of ``base``; what every object has (``__init__``, ``__str__``) aside."""
    return tuple(
        name
        for name in names
        if not hasattr(object, name) and not name.startswith("__annot") and callable(getattr(base, name, None))
    )


def _is_data(cls: type, name: str) -> bool:
    value: Any = getattr(cls, name)
    return not callable(value) and not hasattr(value, "__get__")
