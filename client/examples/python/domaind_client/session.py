"""A session: attached to a domain, with its memory mapped, translating by itself.

One thread uses it. It translates, uses what it found, and lets go of it before it
looks at the socket again. So whenever it acknowledges, nothing is held.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import types_pb2 as types

from domaind_client.errors import Code, NotAllowed, ProtocolError, Refused
from domaind_client.frames import Connection
from domaind_client.memory import Mapping
from domaind_client.table import BOUNCE, COHERENT, FIRST_MEMORY, PageTable, Piece, SessionPage

# How often a range may lead to yet another memory while it is being opened.
OPENINGS_MOST = 5000
APERTURE_KINDS = {BOUNCE: fd.REGION_KIND_BOUNCE, COHERENT: fd.REGION_KIND_COHERENT}


class Session(Connection):
    """An attached process."""

    def __init__(
        self,
        runtime_dir: str,
        domain: str,
        role: int,
        access: int = types.ACCESS_READ_WRITE,
        ack_mode: int = fd.ACK_MODE_FRAMES,
        wants_removals: bool = False,
        wants_additions: bool = False,
    ):
        super().__init__(runtime_dir)
        self.access = access
        self.ack_mode = ack_mode
        self.apertures: list[Aperture] = []
        # Registered memory that was fetched, by its region's number.
        self.opened: dict[int, Mapping] = {}
        self._shared: dict[int, Mapping] = {}
        self._opening: int | None = None
        self._held = 0
        try:
            self.welcome = self.hello()
            self.attach(
                domain=domain, role=role, access=access, ack_mode=ack_mode,
                wants_removals=wants_removals, wants_additions=wants_additions,
            )
        except BaseException:
            self.close()
            raise

    def attach(self, **how) -> None:
        """Attach, and back come the token and one memfd for each region."""
        self.attached, _ = self.ask("attached", attach=fd.Attach(**how))
        self.name: str = self.attached.session
        for _ in range(self.attached.regions):
            region, memfd = self.answer("region")
            try:
                self._map(region, memfd)
            finally:
                os.close(memfd)
        self.generation: int = self.answer("ready")[0].generation
        try:
            self.table = PageTable(self._shared[fd.REGION_KIND_TABLE].words)
            self.page = SessionPage(self._shared[fd.REGION_KIND_SESSION_PAGE].words)
        except KeyError as missing:
            raise ProtocolError(f"no {fd.RegionKind.Name(missing.args[0])}") from missing

    @property
    def metadata(self) -> tuple[tuple[str, str]]:
        """What makes a gRPC call act for this session."""
        return (("domaind-session", self.attached.token.hex()),)

    def send(self, fds: tuple[int, ...] = (), **body) -> None:
        self._must_hold_nothing()
        super().send(fds, **body)

    # Changes, and their acknowledgment.

    def serve(self, timeout_seconds: float = 0) -> int:
        """Takes care of the Changes that have come, and waits so long for a first one. Answers
        how many there were. To be called whenever the socket is readable, and well before
        `attached.ack_timeout_ms` has passed since."""
        self._must_hold_nothing()
        served = 0
        while self.is_readable(0 if served else timeout_seconds):
            frame, memfd = self.receive()
            if not self.takes_by_itself(frame):
                if memfd is not None:
                    os.close(memfd)
                raise ProtocolError(f"{frame.WhichOneof('body')}, and nothing was asked")
            served += 1
        return served

    def changed(self, change: fd.Change) -> None:
        """Drops whatever was derived from what a Change says, and then acknowledges."""
        # Translations are never kept: there are only the memories to close.
        for region in list(self.opened) if change.everything else change.closed:
            if region in self.opened:
                self.opened[region].close()
                del self.opened[region]
        if change.everything or self._opening in change.closed:
            self._opening = None
        if change.ack:
            self.acknowledge(change.generation)

    def acknowledge(self, generation: int) -> None:
        """No translation that is older than this is held here."""
        self.tell(ack=fd.Ack(generation=generation))

    # Translation.

    @contextmanager
    def translate(self, iova: int, length: int, want: int) -> Iterator["Translation"]:
        """Where the bytes of a range are, for the time of a `with` block: use them, and let go
        of them. Meanwhile no other method may be called.

        NotMapped, NotAllowed, SessionEnded; then there is not even a part of it.
        """
        found = self._resolve(iova, iova + length - 1, want)
        try:
            self._held += 1
            yield found
        finally:
            self._held -= 1
            for view in found.views:
                view.release()

    def read(self, iova: int, length: int) -> bytes:
        with self.translate(iova, length, types.PERM_READ) as found:
            return b"".join(found.views)

    def write(self, iova: int, data: bytes) -> None:
        with self.translate(iova, len(data), types.PERM_WRITE) as found:
            done = 0
            for view in found.views:
                view[:] = data[done : done + len(view)]
                done += len(view)

    def walk(self, start: int, last: int, want: int) -> list[Piece]:
        """The pieces that cover a range. Mere numbers, true for as long as no Change is served."""
        if self.ack_mode != fd.ACK_MODE_FRAMES:
            # The service would look for a view in the session page, find none, and go on.
            raise ValueError("this client writes no pins, so such a session must not translate")
        if not 0 <= start <= last < 1 << 64:
            raise ValueError(f"no range of addresses: from {start:#x} to {last:#x}")
        try:
            return self.table.pieces(start, last, want)
        finally:
            # Also if nothing was found: the tree may have been anything by then.
            self.page.check()

    def open(self, region: int) -> None:
        """Fetches and maps the memory behind a region of the page table."""
        self._opening = region
        opened, memfd = self.ask("memory_opened", open_memory=fd.OpenMemory(region=region))
        try:
            # A Change that closes it may have come before the answer. Then the number may soon
            # be another memory's, and what has come must not be found under it.
            if self._opening == region:
                writable = opened.writable and self.access == types.ACCESS_READ_WRITE
                self.opened[region] = Mapping(memfd, opened.size_bytes, writable)
        finally:
            self._opening = None
            os.close(memfd)

    def _resolve(self, start: int, last: int, want: int) -> "Translation":
        for _ in range(OPENINGS_MOST):
            generation = self.table.generation
            pieces = self.walk(start, last, want)
            missing = next((one.region for one in pieces if not self._is_open(one)), None)
            if missing is None:
                return Translation(generation, pieces, [self._view(one, want) for one in pieces])
            try:
                self.open(missing)
            except Refused as refused:
                # Unmapped since the walk: the next walk says so.
                if refused.code != Code.NOT_FOUND:
                    raise
        raise ProtocolError(f"{OPENINGS_MOST} memories were opened, and it takes yet another")

    def _is_open(self, piece: Piece) -> bool:
        return piece.region < FIRST_MEMORY or piece.region in self.opened

    def _view(self, piece: Piece, want: int) -> memoryview:
        mapping, offset = self._memory(piece)
        writes = bool(want & types.PERM_WRITE)
        if writes and not mapping.writable:
            raise NotAllowed(piece.start, "memory that this session can only read")
        view = mapping.bytes(offset, piece.length)
        return view if writes else view.toreadonly()

    def _memory(self, piece: Piece) -> tuple[Mapping, int]:
        if piece.region >= FIRST_MEMORY:
            return self.opened[piece.region], piece.offset
        aperture = self.aperture(piece.start, piece.length)
        if aperture.kind != APERTURE_KINDS[piece.region]:
            raise ProtocolError(f"{piece.start:#x} leads into the wrong aperture")
        return aperture.mapping, piece.start - aperture.start

    def _must_hold_nothing(self) -> None:
        if self._held:
            raise RuntimeError("not inside of `with session.translate(...)`")

    # Apertures, without translation.

    def aperture(self, iova: int, length: int) -> "Aperture":
        for aperture in self.apertures:
            if aperture.start <= iova and iova + length - 1 <= aperture.last:
                return aperture
        raise ValueError(f"{length} bytes at {iova:#x} lie in no aperture")

    def peek(self, iova: int, length: int) -> bytes:
        """Bytes of an aperture, mapped or not: for a driver that knows what it mapped there."""
        return self.aperture(iova, length).read(iova, length)

    def poke(self, iova: int, data: bytes) -> None:
        """As `peek`, for writing."""
        self.aperture(iova, len(data)).write(iova, data)

    # What drivers register.

    def register(
        self, memfd: int, writable: bool = True, persistent: bool = False
    ) -> fd.MemoryRegistered:
        body = fd.RegisterMemory(writable=writable, persistent=persistent)
        return self.ask("memory_registered", (memfd,), register_memory=body)[0]

    def unregister(self, memory_id: int) -> None:
        body = fd.UnregisterMemory(memory_id=memory_id)
        self.ask("memory_unregistered", unregister_memory=body)

    # The end.

    def detach(self) -> None:
        """Lets go of everything, says so, and waits until the service has closed. Also right
        after SessionEnded: what was kept from others because of this session is free then."""
        self._unmap()
        self.tell(detach=fd.Detach())
        while True:
            # Changes and the reason of the end, if they were on their way.
            frame, memfd = self.receive()
            if memfd is not None:
                os.close(memfd)
            if frame is None:
                return self.close()

    def close(self) -> None:
        """Closes the connection, which ends the session, and unmaps everything."""
        super().close()
        self._unmap()

    def _map(self, region: fd.Region, memfd: int) -> None:
        if region.kind in APERTURE_KINDS.values():
            writable = self.access == types.ACCESS_READ_WRITE
            mapping = Mapping(memfd, region.size_bytes, writable)
            self.apertures.append(Aperture(region.kind, region.range.start, mapping))
        elif region.kind in (fd.REGION_KIND_TABLE, fd.REGION_KIND_SESSION_PAGE):
            self._shared[region.kind] = Mapping(memfd, region.size_bytes, writable=False)
        else:
            raise ProtocolError(f"a region of kind {region.kind}")

    def _unmap(self) -> None:
        apertures = [aperture.mapping for aperture in self.apertures]
        for mapping in [*apertures, *self.opened.values(), *self._shared.values()]:
            mapping.close()


@dataclass(frozen=True)
class Translation:
    """Pieces that together cover a range, and the bytes behind each of them."""

    # The table was in this state, or in a newer one.
    generation: int
    pieces: list[Piece]
    # Read-only, unless it was asked for more.
    views: list[memoryview]


@dataclass(frozen=True)
class Aperture:
    """The memory behind an aperture, or a part of it: offset = iova - start."""

    kind: int
    start: int
    mapping: Mapping

    @property
    def last(self) -> int:
        return self.start + self.mapping.size_bytes - 1

    def read(self, iova: int, length: int) -> bytes:
        return bytes(self.mapping.bytes(iova - self.start, length))

    def write(self, iova: int, data: bytes) -> None:
        self.mapping.bytes(iova - self.start, len(data))[:] = data
