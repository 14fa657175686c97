"""The page table and the session page, as README.md describes their words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import types_pb2 as types

from domaind_client.errors import NotAllowed, NotMapped, ProtocolError, SessionEnded

TABLE_MAGIC = int.from_bytes(b"iotlbpt\x01", "big")
PAGE_MAGIC = int.from_bytes(b"domsess\x01", "big")

NODE_BITS = 9
NODE_WORDS = 1 << NODE_BITS

# Words of the table's header.
GRANULE_SHIFT, APERTURES_START, APERTURES_BYTES, GENERATION = 1, 2, 3, 8
APERTURES_ROOT, DIRECT_ROOT = 16, 24
# Word of the session page.
FENCE = 1

# Regions by number; from 2 on it is registered memory.
BOUNCE, COHERENT, FIRST_MEMORY = 0, 1, 2


@dataclass(frozen=True)
class Piece:
    """Addresses from start to last, and where the first of them leads."""

    start: int
    last: int
    region: int
    offset: int
    perm: int

    @property
    def length(self) -> int:
        return self.last - self.start + 1


class PageTable:
    """Walks the table while the service changes it: no call, no lock.

    What a walk finds was true at some instant of the walk; each leaf at one of its own.
    """

    def __init__(self, words: memoryview):
        if len(words) < NODE_WORDS or words[0] != TABLE_MAGIC:
            raise ProtocolError("this is no page table, or one of another version")
        self._words = words
        self._granule_shift = words[GRANULE_SHIFT]
        self._apertures_start = words[APERTURES_START]
        self._apertures_bytes = words[APERTURES_BYTES]

    @property
    def generation(self) -> int:
        """A walk that begins after this sees that state or a newer one."""
        return self._words[GENERATION]

    def lookup(self, iova: int) -> Piece | None:
        """From `iova` to the last address of its leaf; None if nothing is mapped there."""
        granule = iova >> self._granule_shift
        root = self._words[self._root_of(iova)]
        height, node, prefix = root & 7, root >> 3 & (1 << 18) - 1, root >> 21
        shift = height * NODE_BITS
        if height == 0 or granule >> shift != prefix:
            return None
        # A tree that is deeper than its root says is none of the service's.
        while shift > 0:
            shift -= NODE_BITS
            place = node * NODE_WORDS + (granule >> shift & NODE_WORDS - 1)
            if place >= len(self._words):
                return None
            word = self._words[place]
            if word & 0b011:
                return self._leaf(iova, word, shift)
            if not word & 0b100:
                return None
            node = word >> 9
        return None

    def pieces(self, start: int, last: int, want: int) -> list[Piece]:
        """What together covers all of a range, in order. Neighbours that lead on in the same
        memory with the same permission are one piece."""
        pieces: list[Piece] = []
        for leaf in self._leaves(start, last, want):
            before = pieces[-1] if pieces else None
            if before is not None and _leads_on(before, leaf):
                pieces[-1] = replace(before, last=leaf.last)
            else:
                pieces.append(leaf)
        return pieces

    def _leaves(self, start: int, last: int, want: int) -> Iterator[Piece]:
        at = start
        while at <= last:
            leaf = self.lookup(at)
            if leaf is None:
                raise NotMapped(at)
            if leaf.perm & want != want:
                perm, wanted = types.Perm.Name(leaf.perm), types.Perm.Name(want)
                raise NotAllowed(at, f"{perm} and not {wanted}")
            yield replace(leaf, last=min(leaf.last, last))
            at = leaf.last + 1

    def _root_of(self, iova: int) -> int:
        is_inside = 0 <= iova - self._apertures_start < self._apertures_bytes
        return APERTURES_ROOT if is_inside else DIRECT_ROOT

    def _leaf(self, iova: int, word: int, shift: int) -> Piece:
        # It covers so many granules; `iova` is one of their bytes.
        below = (1 << shift + self._granule_shift) - 1
        return Piece(
            start=iova,
            last=iova | below,
            region=word >> 3 & (1 << 20) - 1,
            offset=(word >> 23 << self._granule_shift) + (iova & below),
            perm=word & 0b011,
        )


class SessionPage:
    """The session page. Who acknowledges with frames writes nothing into it."""

    def __init__(self, words: memoryview):
        if len(words) != NODE_WORDS or words[0] != PAGE_MAGIC:
            raise ProtocolError("this is no session page, or one of another version")
        self._words = words

    def check(self) -> None:
        """To be called after each walk: what the walk found counts only if this passes."""
        fence = self._words[FENCE]
        if fence != 0:
            raise SessionEnded(fd.END_REASON_FENCED, f"fenced at generation {fence - 1}")


def _leads_on(before: Piece, leaf: Piece) -> bool:
    end = before.offset + before.length
    return (leaf.region, leaf.offset, leaf.perm) == (before.region, end, before.perm)
