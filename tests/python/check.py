"""What a Python session that translates and acknowledges by frames may rely on.

    check.py RUNTIME_DIR DAEMON_PID

The daemon must be fresh, have a short ack timeout, and allow advisory read-only access.
Started by tests/python.sh.
"""

import mmap
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager

from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import mapping_pb2 as mapping
from domaind.v1 import session_pb2 as session_pb
from domaind.v1 import types_pb2 as types

from clients import GRANULE, INVALID, MIB, STATE, Daemon, Driver, a_domain
from domaind_client.api import PUBLIC, call, refusals, socket_path, wire_range
from domaind_client.errors import Code, NotAllowed, NotMapped, Refused, SessionEnded
from domaind_client.frames import Connection
from domaind_client.memory import Buffer
from domaind_client.session import Session
from fake import broken_frames, broken_tables, late_answers
from harness import Report, eventually, refusal, same

READ, WRITE, BOTH = types.PERM_READ, types.PERM_WRITE, types.PERM_READ_WRITE
# Above the apertures of a_domain(), which are 1 MiB each.
PLACE = 16 * MIB
# In which what does not wait has come.
MOMENT_SECONDS = 0.1
EXAMPLE = "client/examples/python/example.py"
LATE = Code.DEADLINE_EXCEEDED


def main(runtime_dir, pid):
    report = Report()
    eventually("the daemon serves", lambda: serves(runtime_dir, pid), seconds=30)
    daemon = Daemon(runtime_dir, pid)
    the_example(report, daemon)
    translation(report, daemon)
    walker_and_daemon(report, daemon)
    removals(report, daemon)
    changes_between_question_and_answer(report, daemon)
    fences(report, daemon)
    wrong_acks(report, daemon)
    read_only(report, daemon)
    broken_tables(report)
    broken_frames(report)
    late_answers(report)
    with report.check("at the end the daemon holds nothing"):
        def held():
            info = daemon.info()
            return (info.domains, info.sessions, info.memories, info.region_bytes)

        eventually("nothing is held", lambda: held() == (0, 0, 0, 0))
    daemon.close()
    return report.close()


def serves(runtime_dir, pid):
    os.kill(pid, 0)
    return os.path.exists(socket_path(runtime_dir, PUBLIC))


class Holding(Session):
    """Is asked, and acknowledges when it is told to."""

    def __init__(self, *arguments, **more):
        self.asked = []
        super().__init__(*arguments, **more)

    def acknowledge(self, generation):
        self.asked.append(generation)

    def await_ask(self):
        while not self.asked:
            assert self.serve(10), "it is not asked"

    def ack(self, generation):
        super().acknowledge(generation)


@contextmanager
def a_scene(daemon, kind=Session, **how):
    """A domain with a driver and a device, and what the driver registers."""
    with ExitStack() as stack:
        name = stack.enter_context(a_domain(daemon))
        driver = stack.enter_context(closing(Driver(daemon, name)))
        device = stack.enter_context(leaving(kind(daemon.dir, name, types.ROLE_DEVICE, **how)))
        yield Scene(stack, name, driver, device)


@contextmanager
def leaving(session):
    """Says at the end that it holds nothing: this process lives on, and could."""
    with session:
        yield session
        if session.fileno() >= 0:
            session.detach()


class Scene:
    def __init__(self, stack, name, driver, device):
        self.stack, self.name, self.driver, self.device = stack, name, driver, device

    def memory(self, size_bytes, fill):
        """A driver's memory with a letter in every byte, and its id."""
        buffer = self.stack.enter_context(closing(Buffer(size_bytes)))
        buffer.memory[:] = fill * size_bytes
        return buffer, self.driver.session.register(buffer.memfd).memory_id

    def map(self, memory_id, iova=PLACE, size_bytes=GRANULE, offset=0, perm=BOTH):
        self.driver.map_direct(dict(
            memory_id=memory_id, iova=iova, len_bytes=size_bytes, offset=offset, perm=perm))

    def begin(self, method, request):
        return method.future(request, metadata=self.driver.session.metadata, timeout=20)


def the_example(report, daemon):
    def run(runtime_dir):
        return subprocess.run([sys.executable, EXAMPLE, runtime_dir], capture_output=True,
                              text=True, timeout=120)

    with report.check("the example runs as it should, and leaves nothing"):
        done = run(daemon.dir)
        same((done.returncode, done.stderr), (0, ""))
        same(done.stdout.splitlines()[-1], "all as it should be")
        same(daemon.info().domains, 0)
    with report.check("without a daemon the example says so and fails"):
        done = run(os.path.join(daemon.dir, "none"))
        same(done.returncode, 1)
        assert done.stderr.startswith("error: UNAVAILABLE"), done.stderr


def translation(report, daemon):
    with a_scene(daemon) as scene:
        device = scene.device
        one, first = scene.memory(2 * GRANULE, b"1")
        two, second = scene.memory(2 * GRANULE, b"2")
        scene.map(first, size_bytes=2 * GRANULE)
        scene.map(second, PLACE + 2 * GRANULE, offset=GRANULE)
        scene.map(second, PLACE + 4 * GRANULE, perm=READ)
        border = PLACE + 2 * GRANULE
        with report.check("a range over two memories is two pieces, each with its bytes"):
            with device.translate(border - 3, 8, READ) as found:
                same([bytes(view) for view in found.views], [b"111", b"22222"])
                same([(one.start, one.last, one.offset, one.perm) for one in found.pieces],
                     [(border - 3, border - 1, 2 * GRANULE - 3, BOTH),
                      (border, border + 4, GRANULE, BOTH)])
                assert found.pieces[0].region != found.pieces[1].region
        with report.check("neighbours in one memory are one piece"):
            same([one.length for one in device.walk(PLACE, border - 1, BOTH)], [2 * GRANULE])
        with report.check("what is written goes to both, to the byte"):
            device.write(border - 2, b"abcd")
            same((one.memory[-3:], two.memory[GRANULE - 1 : GRANULE + 3]), (b"1ab", b"2cd2"))
        with report.check("a hole is an error that names it, and nothing is written before it"):
            hole = PLACE + 3 * GRANULE
            for start in hole, hole - 5, PLACE:
                same(raised(NotMapped, lambda: device.write(start, b"x" * (hole - start + 1))).at,
                     hole)
            same((one.memory[:5], two.memory[2 * GRANULE - 5 :]), (b"11111", b"22222"))
        with report.check("what may only be read is not written, nor given to be written"):
            at = PLACE + 4 * GRANULE
            same(raised(NotAllowed, lambda: device.write(at, b"x")).at, at)
            with device.translate(at, 1, READ) as found:
                assert found.views[0].readonly
        with report.check("what was found is of no use behind its block"):
            with device.translate(at, 1, READ) as found:
                pass
            raised(ValueError, lambda: found.views[0][0])
        with report.check("the socket is not looked at while a translation is held"):
            with device.translate(at, 1, READ):
                raised(RuntimeError, device.serve)
                raised(RuntimeError, lambda: device.register(0))
            same(device.serve(), 0)


def walker_and_daemon(report, daemon):
    """The walker against Translate, on the same ranges."""
    seed = random.randrange(1 << 32)
    with a_scene(daemon) as scene, report.check("the walker finds what Translate answers") as check:
        check.note = f"seed {seed}"
        dice = random.Random(seed)
        _, memory = scene.memory(4 * MIB, b"m")
        # Leaves of two heights, and trees of several.
        for iova in PLACE, 1 << 30, 1 << 40, (1 << 48) - 8 * MIB:
            scene.map(memory, iova, 4 * MIB)
            for page in range(8):
                offset = dice.randrange(1024) * GRANULE
                scene.map(memory, iova + 4 * MIB + page * GRANULE, offset=offset,
                          perm=dice.choice([READ, WRITE, BOTH]))
            for _ in range(40):
                start = iova + dice.randrange(4 * MIB + 16 * GRANULE)
                last = start + dice.choice([1, GRANULE, 8 * GRANULE, 4 * MIB])
                want = dice.choice([READ, WRITE, BOTH])
                same(walked(scene.device, start, last, want), translated(scene.driver, start, last, want))


def walked(device, start, last, want):
    try:
        pieces = device.walk(start, last, want)
    except NotMapped as hole:
        return hole.at
    except NotAllowed:
        return "not allowed"
    return joined([[one.start, one.last, one.offset, one.perm] for one in pieces])


def translated(driver, start, last, want):
    try:
        pieces = driver.translate(start, last, want).pieces
    except Refused as refused:
        if refused.code == Code.NOT_FOUND:
            return int(refused.metadata["at"], 16)
        same(refused.code, Code.PERMISSION_DENIED)
        return "not allowed"
    return joined([[one.range.start, one.range.last, one.offset, one.perm] for one in pieces])


def joined(pieces):
    """Neighbours that lead on: the daemon knows of mappings, and the table does not."""
    result = []
    for piece in pieces:
        before = result[-1] if result else None
        if before and (piece[2], piece[3]) == (before[2] + piece[0] - before[0], before[3]):
            before[1] = piece[1]
        else:
            result.append(piece)
    return result


def removals(report, daemon):
    with a_scene(daemon, Holding) as scene:
        device, stub, metadata = scene.device, daemon.mappings, scene.driver.session.metadata
        _, memory = scene.memory(GRANULE, b"m")
        place = [wire_range(PLACE, PLACE + GRANULE - 1)]
        table = [
            ("UnmapDirect", stub.UnmapDirect, mapping.UnmapDirectRequest(ranges=place)),
            ("SetMap", stub.SetMap, mapping.SetMapRequest()),
            ("ClearMap", stub.ClearMap, mapping.ClearMapRequest(ranges=place)),
        ]
        for what, method, request in table:
            with report.check(f"{what} is answered when Python acknowledges, and not before"):
                scene.map(memory)
                same(device.read(PLACE, 4), b"mmmm")
                waits(scene, method, request, lambda: device.read(PLACE, 1))
                same(device.opened, {})
        with report.check("FreeCoherent is answered when Python acknowledges, and not before"):
            ring = scene.driver.alloc(len_bytes=8)
            request = mapping.FreeCoherentRequest(iova=ring.iova, mapping_id=ring.mapping_id)
            waits(scene, stub.FreeCoherent, request, lambda: device.read(ring.iova, 1))
        with report.check("memory that somebody still uses is not acknowledged"):
            scene.map(memory)
            device.asked.clear()
            with device.translate(PLACE, 4, READ) as found:
                kept = found.views[0][:2]
            removal = scene.begin(*table[0][1:])
            with kept:
                raised(BufferError, lambda: serve_on(device))
                same((device.asked, removal.done()), ([], False))
            device.opened.popitem()[1].close()
            device.ack(daemon.get(scene.name).generation)
            removal.result()


def waits(scene, method, request, look):
    device = scene.device
    device.asked.clear()
    removal = scene.begin(method, request)
    device.await_ask()
    time.sleep(MOMENT_SECONDS)
    assert not removal.done(), "it did not wait"
    # It is gone at once for whoever looks, and one of an older view does not count.
    raised(NotMapped, look)
    device.ack(device.asked[-1] - 1)
    time.sleep(MOMENT_SECONDS)
    assert not removal.done(), "it took an old Ack"
    device.ack(device.asked[-1])
    with refusals():
        removal.result()


def changes_between_question_and_answer(report, daemon):
    with a_scene(daemon) as scene:
        with report.check("a Change that comes before an answer is acknowledged all the same"):
            other = scene.stack.enter_context(Session(daemon.dir, scene.name, types.ROLE_DRIVER))
            buffer = scene.stack.enter_context(closing(Buffer(GRANULE)))
            ring = scene.driver.alloc(len_bytes=8)
            request = mapping.FreeCoherentRequest(iova=ring.iova, mapping_id=ring.mapping_id)
            removal = scene.begin(daemon.mappings.FreeCoherent, request)
            eventually("it is asked", lambda: owes(daemon, other) and owes(daemon, scene.device))
            scene.device.serve()
            same(removal.done(), False)
            assert other.register(buffer.memfd).memory_id > 0
            with refusals():
                removal.result()
    with a_scene(daemon, wants_additions=True) as scene:
        with report.check("additions are told to who wants them, and ask for nothing"):
            _, memory = scene.memory(GRANULE, b"m")
            told = []
            scene.device.changed = told.append
            scene.map(memory)
            same(scene.device.serve(10), 1)
            same([(change.ack, change.added[0].range.start) for change in told], [(False, PLACE)])


def owes(daemon, session):
    there = call(daemon.sessions.GetSession, session_pb.GetSessionRequest(name=session.name))
    return there.asked_generation > there.acked_generation


def fences(report, daemon):
    with a_scene(daemon, Holding) as scene:
        device, driver = scene.device, scene.driver
        _, memory = scene.memory(GRANULE, b"m")
        ring = driver.alloc(len_bytes=8)
        scene.map(memory)
        same((device.read(PLACE, 1), device.read(ring.iova, 1)), (b"m", b"\0"))
        with report.check("who never acknowledges makes the call DEADLINE_EXCEEDED, and is named"):
            refusal(lambda: driver.unmap_direct((PLACE, PLACE + GRANULE - 1)), LATE,
                    "NOT_ACKNOWLEDGED", sessions=device.name)
        with report.check("it is fenced: its walker refuses what is mapped, and it is told"):
            # By the word in its page: it has not looked at its socket yet.
            same(raised(SessionEnded, lambda: device.read(ring.iova, 1)).reason,
                 fd.END_REASON_FENCED)
            same(raised(SessionEnded, lambda: device.read(PLACE, 1)).reason, fd.END_REASON_FENCED)
            same(raised(SessionEnded, lambda: serve_on(device)).reason, fd.END_REASON_FENCED)
        with report.check("what it could reach stays in quarantine until it detaches"):
            same(quarantined(daemon, scene.name), 1)
            refusal(lambda: scene.map(memory), STATE, "INVALIDATING")
            device.detach()
            eventually("it is free", lambda: quarantined(daemon, scene.name) == 0)
            scene.map(memory)
    with a_scene(daemon, Holding) as scene:
        with report.check("closing the connection is not enough, unmapping is"):
            ring = scene.driver.alloc(len_bytes=8)
            refusal(lambda: scene.driver.free(ring.iova, ring.mapping_id), LATE,
                    "NOT_ACKNOWLEDGED", sessions=scene.device.name)
            scene.device.socket.close()
            # Longer than the daemon waits between two looks.
            time.sleep(0.5)
            same(quarantined(daemon, scene.name), 1)
            scene.device.close()
            eventually("it is free", lambda: quarantined(daemon, scene.name) == 0)
            same(daemon.get(scene.name).usage.fenced_sessions, 0)


def serve_on(session):
    while session.serve(10):
        pass


def quarantined(daemon, name):
    return daemon.get(name).usage.quarantined_mappings


def wrong_acks(report, daemon):
    with a_scene(daemon) as scene:
        ring = scene.driver.alloc(len_bytes=8)
        with report.check("an Ack of the past, or twice, means nothing"):
            for generation in 0, daemon.get(scene.name).generation, 0:
                scene.device.acknowledge(generation)
            same(scene.device.serve(MOMENT_SECONDS), 0)
            same(scene.device.read(ring.iova, 8), bytes(8))
        with report.check("an Ack of what has not been ends that session, and no other"):
            wrong = scene.stack.enter_context(Session(daemon.dir, scene.name, types.ROLE_DEVICE))
            wrong.acknowledge(daemon.get(scene.name).generation + 1)
            same(raised(SessionEnded, lambda: serve_on(wrong)).reason, fd.END_REASON_PROTOCOL)
            wrong.close()
            eventually("it is gone", lambda: daemon.get(scene.name).usage.sessions == 2)
            same(scene.device.serve(MOMENT_SECONDS), 0)
            same(scene.device.read(ring.iova, 8), bytes(8))


def read_only(report, daemon):
    access = types.ACCESS_READ_ONLY
    with a_scene(daemon, access=access) as scene:
        device = scene.device
        _, memory = scene.memory(GRANULE, b"m")
        scene.map(memory)
        with report.check("a read-only session reads, and its client writes nothing"):
            same(device.read(PLACE, 2), b"mm")
            same(raised(NotAllowed, lambda: device.write(PLACE, b"x")).at, PLACE)
            same(device.attached.access_enforced, False)
        with report.check("nor can it map for writing what it is given"):
            with Connection(daemon.dir) as connection:
                same(writable_regions(connection, scene.name, access),
                     {fd.REGION_KIND_SESSION_PAGE})
        with report.check("nor registered memory that it opens"):
            region = device.walk(PLACE, PLACE, READ)[0].region
            opened, memfd = device.ask("memory_opened", open_memory=fd.OpenMemory(region=region))
            same((opened.writable, is_writable(memfd, opened.size_bytes)), (False, False))
            os.close(memfd)
        with report.check("others may write all but the page table"):
            with Connection(daemon.dir) as connection:
                same(writable_regions(connection, scene.name, types.ACCESS_READ_WRITE),
                     {fd.REGION_KIND_BOUNCE, fd.REGION_KIND_COHERENT, fd.REGION_KIND_SESSION_PAGE})
        with report.check("an access that does not exist is refused"):
            refusal(lambda: Session(daemon.dir, scene.name, types.ROLE_DEVICE, access=0), INVALID,
                    "MALFORMED")


def writable_regions(connection, domain, access):
    connection.hello()
    attach = fd.Attach(domain=domain, role=types.ROLE_DEVICE, access=access)
    attached, _ = connection.ask("attached", attach=attach)
    writable = set()
    for _ in range(attached.regions):
        region, memfd = connection.answer("region")
        if is_writable(memfd, region.size_bytes):
            writable.add(region.kind)
        os.close(memfd)
    connection.answer("ready")
    return writable


def is_writable(memfd, size_bytes):
    try:
        mmap.mmap(memfd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
    except PermissionError:
        return False
    return True


def raised(kind, work):
    try:
        answer = work()
    except kind as error:
        return error
    raise AssertionError(f"{answer!r}, and no {kind.__name__}")


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1], int(sys.argv[2])) else 1)
