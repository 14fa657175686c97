"""A session on the fd socket, with Python's standard library only.

The fd socket is SOCK_SEQPACKET: one protobuf frame per packet, memfds as
SCM_RIGHTS. The connection is the session.
"""

import fcntl
import mmap
import os
import socket

import grpc
from domaind.v1 import fdsocket_pb2 as fd
from domaind.v1 import types_pb2 as types

from harness import Refused, TIMEOUT_SECONDS, same, socket_path

FRAME_BYTES = 4096
CODES = {code.value[0]: code for code in grpc.StatusCode}


class Ended(Exception):
    """The service ended the session, and said why."""

    def __init__(self, ended):
        super().__init__(f"{fd.EndReason.Name(ended.reason)}: {ended.message}")
        self.reason = ended.reason


class Connection:
    """A connection to the fd socket: numbered frames, and fds beside them."""

    def __init__(self, runtime_dir):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_SECONDS)
        self.socket.connect(socket_path(runtime_dir, "public/fd.sock"))
        self.request_id = 0

    def send(self, fds=(), **body):
        self.request_id += 1
        frame = fd.ClientFrame(request_id=self.request_id, **body)
        socket.send_fds(self.socket, [frame.SerializeToString()], list(fds))

    def receive(self):
        """The next frame and its fds; None when the service has closed."""
        data, fds, flags, _ = socket.recv_fds(
            self.socket, FRAME_BYTES + 1, 4, socket.MSG_CMSG_CLOEXEC
        )
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a packet was cut off"
        if not data:
            return None, []
        assert len(data) <= FRAME_BYTES
        return fd.ServerFrame.FromString(data), fds

    def answer(self, kind, wanted_fds=0):
        """The next frame, which must answer the last request with `kind`."""
        frame, fds = self.receive()
        assert frame is not None, "the service closed the connection"
        body = frame.WhichOneof("body")
        if body == "session_ended":
            raise Ended(frame.session_ended)
        same(frame.request_id, self.request_id)
        if body == "refusal":
            raise refused(frame.refusal)
        same((body, len(fds)), (kind, wanted_fds))
        answer = getattr(frame, body)
        return (answer, fds[0]) if wanted_fds else answer

    def hello(self):
        self.send(hello=fd.Hello(min_version=1, max_version=1, agent="grpcio-check"))
        return self.answer("welcome")

    def close(self):
        self.socket.close()
        # Whoever keeps its memory mapped may still reach it, and is waited for.
        for aperture in getattr(self, "apertures", ()):
            aperture.close()


class Session(Connection):
    """An attached process, with the domain's memory mapped."""

    def __init__(self, runtime_dir, domain, role, access=types.ACCESS_READ_WRITE):
        super().__init__(runtime_dir)
        try:
            self.welcome = self.hello()
            self.attach(domain, role, access)
        except BaseException:
            self.close()
            raise

    def attach(self, domain, role, access):
        # It never pins, and so never owes an Ack.
        self.send(attach=fd.Attach(domain=domain, role=role, access=access, ack_mode=fd.ACK_MODE_PINS))
        self.attached = self.answer("attached")
        self.name = self.attached.session
        self.apertures = []
        for _ in range(self.attached.regions):
            region, memfd = self.answer("region", wanted_fds=1)
            if region.HasField("range"):
                self.apertures.append(Aperture(region, memfd))
            else:
                # The page table and the session page: this client translates nothing.
                os.close(memfd)
        self.generation = self.answer("ready").generation

    @property
    def metadata(self):
        """What makes a gRPC call act for this session."""
        return (("domaind-session", self.attached.token.hex()),)

    def aperture(self, iova, length):
        for aperture in self.apertures:
            if aperture.start <= iova and iova + length - 1 <= aperture.last:
                return aperture
        raise AssertionError(f"{length} bytes at {iova:#x} lie in no aperture")

    def read(self, iova, length):
        return self.aperture(iova, length).read(iova, length)

    def write(self, iova, data):
        self.aperture(iova, len(data)).write(iova, data)

    def register(self, memfd, writable=True, persistent=False):
        body = fd.RegisterMemory(writable=writable, persistent=persistent)
        self.send(register_memory=body, fds=[memfd])
        return self.answer("memory_registered")

    def unregister(self, memory_id):
        self.send(unregister_memory=fd.UnregisterMemory(memory_id=memory_id))
        return self.answer("memory_unregistered")

    def detach(self):
        """Asks for the end and waits until the service has closed."""
        self.send(detach=fd.Detach())
        frame, _ = self.receive()
        assert frame is None, frame
        self.close()


class Aperture:
    """One region of the domain in this process: file offset = iova - start."""

    def __init__(self, region, memfd):
        self.kind = region.kind
        self.start = region.range.start
        self.last = region.range.last
        self.stat = os.fstat(memfd)
        self.seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        self.memory = mmap.mmap(memfd, self.last - self.start + 1)
        os.close(memfd)

    def read(self, iova, length):
        return self.memory[iova - self.start : iova - self.start + length]

    def write(self, iova, data):
        self.memory[iova - self.start : iova - self.start + len(data)] = data

    def close(self):
        self.memory.close()


class Buffer:
    """A driver's own memory: a memfd of a fixed size, mapped here."""

    def __init__(self, size, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
        self.memfd = os.memfd_create("grpcio-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, size)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, seals)
        self.memory = mmap.mmap(self.memfd, size)

    def close(self):
        self.memory.close()
        os.close(self.memfd)


def refused(refusal):
    reason = types.ErrorReason.Name(refusal.reason).removeprefix("ERROR_REASON_")
    return Refused(CODES[refusal.code], reason, refusal.message, dict(refusal.metadata))
