"""Reading objects of which every field must be understood."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class NotUnderstood(Exception):
    """A field that this kubelet would have to ignore."""


class Fields:
    """The fields of one object, each to be taken once."""

    def __init__(self, path: str, value: Any) -> None:
        if value is not None and not isinstance(value, dict):
            raise NotUnderstood(f"{path}: {value!r} is no object")
        self.path = path
        self._left: dict[str, Any] = dict(value or {})

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """The value; a null is as if it were not there."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def need(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise NotUnderstood(f"{self.path}.{name} is missing")
        return value

    def sub(self, name: str) -> Fields:
        """An object below; empty if it is not there."""
        return Fields(f"{self.path}.{name}", self.take(name))

    def items(self, name: str) -> list[Fields]:
        return [Fields(f"{self.path}.{name}[{at}]", item) for at, item in enumerate(self.take(name, []))]

    def must_be(self, name: str, *allowed: Any) -> None:
        """For a field that has no other value here, or none at all."""
        value = self.take(name)
        if value is not None and value not in allowed:
            raise NotUnderstood(f"{self.path}.{name}: {value!r} is not understood, only {allowed!r}")

    def ignore(self, *names: str) -> None:
        """For what is for others than a kubelet."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        if self._left:
            names = ", ".join(f"{self.path}.{name}" for name in sorted(self._left))
            raise NotUnderstood(f"not understood: {names}")


@contextmanager
def reading(path: str, value: Any) -> Iterator[Fields]:
    """Takes an object apart; whoever leaves has taken all of it."""
    fields = Fields(path, value)
    yield fields
    fields.done()
