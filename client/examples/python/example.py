"""A driver and a device in two processes share one domain.

    example.py [RUNTIME_DIR]

Needs a running daemon, and leaves nothing behind in it. Prints what happens, and exits
with 1 if anything is not as it should be. RUNTIME_DIR is by default what
DOMAIND_RUNTIME_DIR says, or /run/domaind.
"""

import multiprocessing
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait

from domaind.v1 import domain_pb2 as domain
from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import types_pb2 as types

from domaind_client.api import Api, call, refusals, wire_range
from domaind_client.errors import Code, NotAllowed, NotMapped, Refused
from domaind_client.memory import Buffer
from domaind_client.session import Session

GRANULE = 4096
APERTURE_BYTES = 1 << 20
# Where direct mappings go: above the apertures.
PLACE = 1 << 24
# For a device that has nothing to do.
LONG_SECONDS = 30
READ, READ_WRITE = types.PERM_READ, types.PERM_READ_WRITE


class Mismatch(Exception):
    """Something is not as it should be."""


def main(runtime_dir: str) -> None:
    with ExitStack() as stack:
        api = Api(runtime_dir)
        stack.callback(api.close)
        name = stack.enter_context(a_domain(api))
        device = stack.enter_context(DeviceProcess(runtime_dir, name))
        driver = stack.enter_context(Driver(runtime_dir, name, api))
        expect("the device has opened no memory", device.do("opened"), 0)

        direct(driver, device)
        coherent(driver, device)
        streaming(driver, device)
        unmap_is_acknowledged(driver, device)
        tables(driver, device)

        device.do("detach")
        expect("the device process ends in order", device.end(), 0)
        driver.detach()
    print("all as it should be")


def direct(driver: "Driver", device: "DeviceProcess") -> None:
    """Two memories side by side are one range of addresses to the device."""
    first, second = driver.buffer(2 * GRANULE), driver.buffer(GRANULE)
    driver.map_direct(first, PLACE)
    driver.map_direct(second, PLACE + 2 * GRANULE)

    border = PLACE + 2 * GRANULE
    first.memory[2 * GRANULE - 5 :] = b"first"
    second.memory[:6] = b"second"
    expect("the device reads across both memories",
           device.do("read", border - 5, 11), b"firstsecond")
    expect("which are two pieces", device.do("pieces", border - 5, 11), [5, 6])
    expect("and both are open now", device.do("opened"), 2)

    device.do("write", border - 5, b"FIRSTSECOND")
    expect("the driver sees at once what the device wrote, in the one",
           first.memory[2 * GRANULE - 5 :], b"FIRST")
    expect("and in the other", second.memory[:6], b"SECOND")
    expect("behind them is nothing", device.do("read", border + GRANULE - 1, 2),
           f"nothing is mapped at {border + GRANULE:#x}")


def coherent(driver: "Driver", device: "DeviceProcess") -> None:
    """Rings and doorbells lie in memory that both have all the time."""
    request = mapping.AllocCoherentRequest(len_bytes=64)
    ring = driver.call(driver.api.mappings.AllocCoherent, request)
    driver.session.poke(ring.iova, b"ring")
    expect("the device reads coherent memory", device.do("read", ring.iova, 4), b"ring")
    device.do("write", ring.iova, b"DING")
    expect("and the driver what it wrote", driver.session.peek(ring.iova, 4), b"DING")
    request = mapping.FreeCoherentRequest(iova=ring.iova, mapping_id=ring.mapping_id)
    driver.call(driver.api.mappings.FreeCoherent, request)
    expect("freed, it is gone", device.do("read", ring.iova, 4),
           f"nothing is mapped at {ring.iova:#x}")


def streaming(driver: "Driver", device: "DeviceProcess") -> None:
    """A buffer is copied in, worked on, and copied back."""
    buffer = driver.buffer(GRANULE)
    buffer.memory[100:108] = b"question"
    entry = mapping.MapEntry(
        memory_id=driver.memory_id(buffer), offset=100, len_bytes=8,
        direction=types.DIRECTION_BIDIRECTIONAL,
    )
    request = mapping.MapRequest(entries=[entry])
    mapped = driver.call(driver.api.mappings.Map, request).results[0].mapping
    expect("the device reads what was bounced", device.do("read", mapped.iova, 8), b"question")
    device.do("write", mapped.iova, b"answered")
    expect("before Unmap the buffer is as it was", buffer.memory[100:108], b"question")
    named = mapping.UnmapEntry(iova=mapped.iova, mapping_id=mapped.mapping_id)
    driver.call(driver.api.mappings.Unmap, mapping.UnmapRequest(entries=[named]))
    expect("and afterwards as the device left it", buffer.memory[:],
           bytes(100) + b"answered" + bytes(GRANULE - 108))
    expect("the range is gone", device.do("read", mapped.iova, 8),
           f"nothing is mapped at {mapped.iova:#x}")


def unmap_is_acknowledged(driver: "Driver", device: "DeviceProcess") -> None:
    """The driver's call is answered when the device has let go."""
    device.do("pause")
    request = mapping.UnmapDirectRequest(ranges=[wire_range(PLACE, PLACE + 3 * GRANULE - 1)])
    unmapping = driver.begin(driver.api.mappings.UnmapDirect, request)
    time.sleep(0.1)
    expect("UnmapDirect waits for a device that does not look", unmapping.done(), False)
    device.do("resume")
    with refusals():
        expect("and is answered when it has acknowledged",
               unmapping.result().unmapped_mappings, 2)
    expect("what the device had opened is closed", device.do("opened"), 0)
    expect("it translates there no more", device.do("read", PLACE, 1),
           f"nothing is mapped at {PLACE:#x}")
    lookup = mapping.LookupRequest(range=wire_range(PLACE, PLACE + 3 * GRANULE - 1))
    expect("and the daemon knows of nothing there",
           refused(lambda: driver.call(driver.api.mappings.Lookup, lookup)), Code.NOT_FOUND)


def tables(driver: "Driver", device: "DeviceProcess") -> None:
    """SetMap puts a whole table in the place of another."""
    old, new = driver.buffer(GRANULE), driver.buffer(GRANULE)
    old.memory[:3], new.memory[:3] = b"old", b"new"
    driver.set_map(old, PLACE, READ)
    expect("the device sees the table", device.do("read", PLACE, 3), b"old")
    expect("and may only read", device.do("write", PLACE, b"x"),
           f"PERM_READ and not PERM_WRITE at {PLACE:#x}")
    answer = driver.set_map(new, PLACE, READ_WRITE)
    expect("a second table takes its place", (answer.added, answer.removed), (1, 1))
    expect("and leads to the other memory", device.do("read", PLACE, 3), b"new")
    expect("the only one that is open", device.do("opened"), 1)


class Driver:
    """Owns buffers. It never translates, and so has nothing to acknowledge: a session
    by pins that writes no pin is never waited for."""

    def __init__(self, runtime_dir: str, domain_name: str, api: Api):
        self.api = api
        self.session = Session(
            runtime_dir, domain_name, types.ROLE_DRIVER, ack_mode=fd.ACK_MODE_PINS)
        self._memories: dict[Buffer, int] = {}

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_) -> None:
        self.session.close()
        for buffer in self._memories:
            buffer.close()

    def buffer(self, size_bytes: int) -> Buffer:
        buffer = Buffer(size_bytes)
        self._memories[buffer] = self.session.register(buffer.memfd).memory_id
        return buffer

    def memory_id(self, buffer: Buffer) -> int:
        return self._memories[buffer]

    def call(self, method, request):
        return call(method, request, metadata=self.session.metadata)

    def begin(self, method, request):
        """A call that goes on while its future is not asked for the result."""
        return method.future(request, metadata=self.session.metadata, timeout=LONG_SECONDS)

    def map_direct(self, buffer: Buffer, iova: int) -> None:
        entry = mapping.MapDirectEntry(
            memory_id=self.memory_id(buffer), len_bytes=len(buffer.memory), perm=READ_WRITE,
            iova=iova,
        )
        self.call(self.api.mappings.MapDirect, mapping.MapDirectRequest(entries=[entry]))

    def set_map(self, buffer: Buffer, iova: int, perm: int) -> mapping.SetMapResponse:
        entry = mapping.DirectMapping(
            range=wire_range(iova, iova + len(buffer.memory) - 1),
            memory_id=self.memory_id(buffer), perm=perm,
        )
        return self.call(self.api.mappings.SetMap, mapping.SetMapRequest(entries=[entry]))

    def detach(self) -> None:
        self.call(self.api.mappings.SetMap, mapping.SetMapRequest())
        for memory_id in self._memories.values():
            self.session.unregister(memory_id)
        self.session.detach()


class DeviceProcess:
    """A device in a process of its own, as the driver's process sees it."""

    def __init__(self, runtime_dir: str, domain_name: str):
        # Not a fork: grpcio does not survive one.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (runtime_dir, domain_name, theirs)
        self.process = context.Process(target=device, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def do(self, what: str, *arguments):
        """Says what to do and waits for the answer."""
        self.pipe.send((what, arguments))
        if not self.pipe.poll(LONG_SECONDS):
            raise Mismatch("the device does not answer")
        return self.pipe.recv()

    def end(self) -> int | None:
        self.process.join(LONG_SECONDS)
        return self.process.exitcode

    def __enter__(self) -> "DeviceProcess":
        return self

    def __exit__(self, *_) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()


def device(runtime_dir: str, domain_name: str, pipe: Pipe) -> None:
    """The device's process: does what it is told, and serves its session meanwhile."""
    with Session(runtime_dir, domain_name, types.ROLE_DEVICE) as session:
        Device(session, pipe).run()


class Device:
    """A session, and somebody who says what to do with it."""

    def __init__(self, session: Session, pipe: Pipe):
        self.session = session
        self.pipe = pipe
        self.is_paused = False
        self.is_done = False

    def run(self) -> None:
        while not self.is_done:
            ready = wait([self.pipe] if self.is_paused else [self.pipe, self.session])
            # First what the service says: an Ack is never to wait for work.
            if self.session in ready:
                self.session.serve()
            elif self.pipe in ready:
                what, arguments = self.pipe.recv()
                self.pipe.send(self.obey(what, *arguments))

    def obey(self, what: str, *arguments):
        try:
            return getattr(self, what)(*arguments)
        except (NotMapped, NotAllowed) as error:
            return str(error)

    def read(self, iova: int, length: int) -> bytes:
        return self.session.read(iova, length)

    def write(self, iova: int, data: bytes) -> None:
        self.session.write(iova, data)

    def pieces(self, iova: int, length: int) -> list[int]:
        with self.session.translate(iova, length, READ) as found:
            return [len(view) for view in found.views]

    def opened(self) -> int:
        return len(self.session.opened)

    def pause(self) -> None:
        """Does not look at the socket, so that somebody has to wait."""
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def detach(self) -> None:
        self.session.detach()
        self.is_done = True


@contextmanager
def a_domain(api: Api):
    """A domain, and its end: in order after an orderly run, by force after another."""
    domain_id = f"python-{os.getpid()}"
    spec = domain.DomainSpec(bounce_bytes=APERTURE_BYTES, coherent_bytes=APERTURE_BYTES)
    request = domain.CreateDomainRequest(domain_id=domain_id, spec=spec)
    name = call(api.domains.CreateDomain, request).name
    print(f"{name} created")
    force = True
    try:
        yield name
        force = False
    finally:
        call(api.domains.DeleteDomain, domain.DeleteDomainRequest(name=name, force=force))
        print(f"{name} deleted")


def refused(work) -> Code | None:
    try:
        work()
    except Refused as refusal:
        return refusal.code
    return None


def expect(what: str, got, wanted) -> None:
    if got != wanted:
        raise Mismatch(f"{what}: {got!r} instead of {wanted!r}")
    print(f"  {what}")


if __name__ == "__main__":
    default = os.environ.get("DOMAIND_RUNTIME_DIR", "/run/domaind")
    try:
        main(*sys.argv[1:] or [default])
    except (Mismatch, Refused, OSError) as error:
        sys.exit(f"error: {error}")
