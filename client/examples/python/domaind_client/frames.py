"""Frames of the fd socket: one protobuf message a packet, and beside some an fd."""

import os
import select
import socket

from domaind.v1 import fdsocket_pb2 as fd
from google.protobuf.message import DecodeError

from domaind_client import TIMEOUT_SECONDS
from domaind_client.errors import ProtocolError, Refused, SessionEnded

FRAME_BYTES = 4096
# More than a frame may carry, so that a surplus one is noticed and closed.
FDS_ROOM = 4
CARRY_FD = {"region", "memory_opened"}


class Connection:
    """A connection to the fd socket, used by one thread."""

    def __init__(self, runtime_dir: str):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.request_id = 0
        try:
            self.socket.settimeout(TIMEOUT_SECONDS)
            self.socket.connect(os.path.join(runtime_dir, "public", "fd.sock"))
        except BaseException:
            self.socket.close()
            raise

    def fileno(self) -> int:
        """For select and its like: readable means that `serve` or `receive` has something to do."""
        return self.socket.fileno()

    def send(self, fds: tuple[int, ...] = (), **body) -> None:
        """Sends a request, whose one keyword names its body."""
        self.request_id += 1
        frame = fd.ClientFrame(request_id=self.request_id, **body)
        socket.send_fds(self.socket, [frame.SerializeToString()], list(fds))

    def tell(self, **body) -> None:
        """Sends what has no answer, also between a request and its answer."""
        self.socket.send(fd.ClientFrame(**body).SerializeToString())

    def receive(self) -> tuple[fd.ServerFrame | None, int | None]:
        """The next frame and its fd, which the caller has to close. No frame: the service has
        closed."""
        data, fds, flags, _ = socket.recv_fds(
            self.socket, FRAME_BYTES + 1, FDS_ROOM, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not data:
                return None, None
            frame = _parse(data, flags)
            if len(fds) != (frame.WhichOneof("body") in CARRY_FD):
                raise ProtocolError(f"{frame.WhichOneof('body')} with {len(fds)} fds")
            return frame, fds.pop() if fds else None
        finally:
            for one in fds:
                os.close(one)

    def answer(self, kind: str):
        """The answer to the last request, which must be a `kind`, and its fd. Changes that come
        before it are taken care of."""
        while True:
            frame, memfd = self.receive()
            if self.takes_by_itself(frame):
                continue
            try:
                return _answer(frame, self.request_id, kind), memfd
            except BaseException:
                if memfd is not None:
                    os.close(memfd)
                raise

    def ask(self, kind: str, fds: tuple[int, ...] = (), **body):
        """Sends a request; its answer, and the fd that came along."""
        self.send(fds, **body)
        return self.answer(kind)

    def takes_by_itself(self, frame: fd.ServerFrame | None) -> bool:
        """Whether the frame was no answer, and is done with."""
        if frame is None:
            raise SessionEnded(fd.END_REASON_UNSPECIFIED, "the service closed the connection")
        match frame.WhichOneof("body"):
            case "session_ended":
                raise SessionEnded(frame.session_ended.reason, frame.session_ended.message)
            case "change":
                self.changed(frame.change)
                return True
        return False

    def changed(self, change: fd.Change) -> None:
        raise ProtocolError("a Change for a connection that is no session")

    def hello(self, agent: str = "domaind-python/1") -> fd.Welcome:
        return self.ask("welcome", hello=fd.Hello(min_version=1, max_version=1, agent=agent))[0]

    def is_readable(self, timeout_seconds: float) -> bool:
        # Not select.select, which knows only fds below 1024.
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))

    def close(self) -> None:
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _parse(data: bytes, flags: int) -> fd.ServerFrame:
    # MSG_CTRUNC is also how it looks when this process has no free descriptor.
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > FRAME_BYTES:
        raise ProtocolError("a packet or its fds were cut off")
    try:
        return fd.ServerFrame.FromString(data)
    except DecodeError as error:
        raise ProtocolError("a packet that is no frame") from error


def _answer(frame: fd.ServerFrame, request_id: int, kind: str):
    body = frame.WhichOneof("body")
    if frame.request_id != request_id:
        raise ProtocolError(f"{body} answers request {frame.request_id}, not {request_id}")
    if body == "refusal":
        raise Refused.of_frame(frame.refusal)
    if body != kind:
        raise ProtocolError(f"{body} instead of {kind}")
    return getattr(frame, kind)
