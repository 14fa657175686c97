"""A service that breaks its word, and tables that no service makes."""

import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import types_pb2 as types

from domaind_client.errors import ProtocolError, SessionEnded
from domaind_client.memory import Buffer
from domaind_client.session import Session
from domaind_client.table import NODE_WORDS, PAGE_MAGIC, TABLE_MAGIC, PageTable, SessionPage
from harness import same

GRANULE_SHIFT = 12
# The first address of the second node of height 1.
PLACE = NODE_WORDS << GRANULE_SHIFT
READ = types.PERM_READ
REGION = 2


def broken_tables(report):
    def table(*nodes, root):
        words = header(root)
        for node in nodes:
            words += [node.get(slot, 0) for slot in range(NODE_WORDS)]
        return PageTable(view(words))

    with report.check("a leaf of a table made by hand is found, in a node and in one above"):
        leaf = 3 | REGION << 3 | 7 << 23
        low = table({5: leaf}, root=root_word(1, 1, PLACE >> GRANULE_SHIFT >> 9))
        same(offset(low, PLACE + (5 << GRANULE_SHIFT) + 1), (7 << GRANULE_SHIFT) + 1)
        high = table({1: leaf}, root=root_word(2, 1))
        same(offset(high, PLACE + 1), (7 << GRANULE_SHIFT) + 1)
    broken = [
        ("a root behind the end", table(root=root_word(1, 9, 1))),
        ("a pointer behind the end", table({1: pointer(9)}, root=root_word(2, 1))),
        ("a pointer to itself", table({0: pointer(1), 1: pointer(1)}, root=root_word(2, 1))),
        ("a root of height 0", table({0: 3}, root=root_word(0, 1, 1))),
        ("a root of another prefix", table({0: 3}, root=root_word(1, 1, 2))),
        ("a word that is neither", table({0: 1 << 23}, root=root_word(1, 1, 1))),
    ]
    for what, words in broken:
        with report.check(f"{what} leads nowhere"):
            same(words.lookup(PLACE), None)
    with report.check("a table or page of another version is refused"):
        for kind, magic in (PageTable, TABLE_MAGIC), (SessionPage, PAGE_MAGIC):
            raised(lambda: kind(view([magic + 1] + [0] * 511)))
            raised(lambda: kind(view([magic])))
            kind(view([magic] + [0] * 511))


def broken_frames(report):
    change = fd.ServerFrame(change=fd.Change(generation=1))
    broken = [
        ("an fd beside a frame that takes none", lambda peer: peer.send(change, 1)),
        ("no fd beside one that needs it", lambda peer: peer.send(opened())),
        ("two fds", lambda peer: peer.send(opened(), 2)),
        ("more fds than there is room for", lambda peer: peer.send(opened(), 9)),
        ("a packet that is too long", lambda peer: peer.socket.send(b"\0" * 5000)),
        ("a packet that is no frame", lambda peer: peer.socket.send(b"\xff" * 16)),
        ("a frame without a body", lambda peer: peer.send(fd.ServerFrame(request_id=1))),
        ("an answer that nobody asked for", lambda peer: peer.send(opened(), 1)),
    ]
    for what, send in broken:
        with report.check(f"{what} is a ProtocolError, and no fd is left"):
            before = len(os.listdir("/proc/self/fd"))
            with a_session(send) as session:
                raised(lambda: session.serve(10))
            same(len(os.listdir("/proc/self/fd")), before)
    with report.check("an answer to another question is a ProtocolError, and no fd is left"):
        before = len(os.listdir("/proc/self/fd"))
        with a_session(lambda peer: (peer.receive(), peer.send(opened(99), 1))) as session:
            raised(lambda: session.open(REGION))
        same(len(os.listdir("/proc/self/fd")), before)
    with report.check("memory that could shrink, or is shorter than was said, is not mapped"):
        def loose(peer):
            buffer = Buffer(4096, seals=0)
            peer.send_fds(opened(peer.receive().request_id), [buffer.memfd])
            buffer.close()

        def short(peer):
            peer.send(opened(peer.receive().request_id, size_bytes=8192), 1)

        for send in loose, short:
            with a_session(send) as session:
                raised(lambda: session.open(REGION))
                same(session.opened, {})


def late_answers(report):
    def late(peer):
        request = peer.receive().request_id
        peer.send(fd.ServerFrame(change=fd.Change(generation=5, ack=True, closed=[REGION])))
        peer.send(opened(request), 1, fill=b"old")
        same(peer.receive().ack.generation, 5)
        peer.send(opened(peer.receive().request_id), 1, fill=b"new")

    with report.check("memory that comes after the Change that closed it is not used"):
        with a_session(late, leaf=True) as session:
            same(session.read(PLACE, 3), b"new")
            same(len(session.opened), 1)

    def everything(peer):
        peer.send(opened(peer.receive().request_id), 1, fill=b"old")
        peer.receive()
        peer.send(fd.ServerFrame(change=fd.Change(generation=5, ack=True, everything=True)))
        same(peer.receive().ack.generation, 5)

    with report.check("a Change of everything closes everything"):
        with a_session(everything, leaf=True) as session:
            same(session.read(PLACE, 3), b"old")
            session.acknowledge(1)
            same((session.serve(10), session.opened), (1, {}))

    with report.check("a walk is worth nothing when the session page says so behind it"):
        with a_session(lambda peer: None, leaf=True, fence=9) as session:
            try:
                session.walk(PLACE, PLACE, READ)
            except SessionEnded as ended:
                same(ended.reason, fd.END_REASON_FENCED)
            else:
                raise AssertionError("it was believed")


@contextmanager
def a_session(script, **memory):
    """A session whose service greets it as it should, and goes on as `script` says."""
    with tempfile.TemporaryDirectory() as runtime_dir, ThreadPoolExecutor(1) as pool:
        path = os.path.join(runtime_dir, "public", "fd.sock")
        os.mkdir(os.path.dirname(path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.settimeout(10)
            listener.bind(path)
            listener.listen()
            served = pool.submit(serve, listener, script, memory)
            with Session(runtime_dir, "domains/fake", types.ROLE_DEVICE) as session:
                yield session
            served.result()


def serve(listener, script, memory):
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10)
        peer = Peer(connection)
        peer.greet(**memory)
        script(peer)
        # Until the client has had enough.
        while connection.recv(4096):
            pass


class Peer:
    """The service's end."""

    def __init__(self, connection):
        self.socket = connection

    def receive(self):
        return fd.ClientFrame.FromString(self.socket.recv(4096))

    def send(self, frame, fds=0, fill=b""):
        """With so many memfds of one page."""
        buffers = [Buffer(4096) for _ in range(fds)]
        for buffer in buffers:
            buffer.memory[: len(fill)] = fill
        self.send_fds(frame, [buffer.memfd for buffer in buffers])
        for buffer in buffers:
            buffer.close()

    def send_fds(self, frame, fds):
        socket.send_fds(self.socket, [frame.SerializeToString()], fds)

    def greet(self, leaf=False, fence=0):
        request = self.receive().request_id
        self.send(fd.ServerFrame(request_id=request, welcome=fd.Welcome(version=1)))
        request = self.receive().request_id
        self.send(fd.ServerFrame(request_id=request, attached=fd.Attached(regions=2)))
        node = [3 | REGION << 3 if leaf else 0] + [0] * 511
        table = header(root_word(1, 1, 1)) + node
        page = [PAGE_MAGIC, fence] + [0] * 510
        for kind, words in (fd.REGION_KIND_TABLE, table), (fd.REGION_KIND_SESSION_PAGE, page):
            buffer = Buffer(len(words) * 8)
            buffer.memory[:] = bytes(view(words).cast("B"))
            region = fd.Region(kind=kind, size_bytes=len(words) * 8)
            self.send_fds(fd.ServerFrame(request_id=request, region=region), [buffer.memfd])
            buffer.close()
        self.send(fd.ServerFrame(request_id=request, ready=fd.Ready()))


def opened(request_id=0, size_bytes=4096):
    body = fd.MemoryOpened(memory_id=1, size_bytes=size_bytes, writable=True)
    return fd.ServerFrame(request_id=request_id, memory_opened=body)


def header(root):
    words = [0] * NODE_WORDS
    words[0], words[1], words[24] = TABLE_MAGIC, GRANULE_SHIFT, root
    return words


def root_word(height, node, prefix=0):
    return prefix << 21 | node << 3 | height


def pointer(node):
    return node << 9 | 4


def view(words):
    """Words as they lie in shared memory."""
    memory = memoryview(bytearray(8 * len(words))).cast("Q")
    for index, word in enumerate(words):
        memory[index] = word
    return memory


def offset(table, iova):
    return table.lookup(iova).offset


def raised(work):
    try:
        answer = work()
    except ProtocolError:
        return
    raise AssertionError(f"{answer!r}, and no ProtocolError")
