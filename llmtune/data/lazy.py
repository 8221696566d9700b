"""Sequences whose items are made when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class LazySequence(Sequence[Item]):
    """A sequence that knows its length and makes the item at a place; a slice of it is a list."""

    @abstractmethod
    def item(self, place: int) -> Item:
        """Make the item at a place from 0 to the length, without it."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        return [self.item(place) for place in places] if isinstance(places, range) else self.item(places)
