"""The names by which checkpoints and the command line know patterns."""

from typing import Any, TypeVar

from shfl_jax.patterns._base import Pattern

Kind = TypeVar("Kind", bound=type[Pattern])

_KINDS: dict[str, type[Pattern]] = {}


def register(kind: Kind) -> Kind:
    """Makes a pattern known by its `name`, so that `save` can store it and `load` find it. A class decorator.

        @shfl_jax.patterns.register
        @dataclasses.dataclass(frozen=True)
        class Rows(shfl_jax.Pattern):
            name: ClassVar[str] = "rows"

    Args:
        kind: a frozen dataclass, whose fields are what checkpoints hold. The same class defined anew, in a notebook,
            takes the place of the old one.

    Returns:
        The class.

    Raises:
        ValueError: it has no name, or another class has it.
    """
    name = getattr(kind, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"{_full_name(kind)} has no name to register; give it `name: ClassVar[str] = ...`")
    if _full_name(_KINDS.setdefault(name, kind)) != _full_name(kind):
        raise ValueError(
            f"{_full_name(kind)} cannot be registered as {name!r}, which is {_full_name(_KINDS[name])}; "
            "give it a name of its own"
        )
    _KINDS[name] = kind
    return kind


def registered() -> dict[str, type[Any]]:
    """Name -> class of every registered pattern."""
    return dict(_KINDS)


def registered_name(pattern: Pattern) -> str:
    """The name under which the pattern's class is registered.

    Raises:
        ValueError: it is not registered.
    """
    kind = type(pattern)
    if _KINDS.get(pattern.name) is not kind:
        raise ValueError(
            f"the pattern {pattern!r} cannot be stored, because no name stands for its class: decorate "
            f"{_full_name(kind)} with `@shfl_jax.patterns.register`, here and in the program that loads it"
        )
    return pattern.name


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
