//! Frames of the fd socket: one protobuf message per `SOCK_SEQPACKET` packet,
//! with at most one fd.
//!
//! Sent with sendfd where an fd goes along, received with rustix: sendfd's
//! receive has neither CLOEXEC nor a way to see that control data was cut off.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net;
use std::path::Path;

use domain_core::limits::FRAME_BYTES;
use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType,
};
use sendfd::SendWithFd;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// How many fds a peer may attach before its packet counts as truncated. One
/// more than is ever right, so that a surplus is seen.
const FD_SLOTS: usize = 2;

/// One end of a connection to the fd socket.
///
/// Must be made and used inside a tokio runtime. All methods are
/// cancel safe: a frame is sent or received whole or not at all.
#[derive(Debug)]
pub struct FrameSocket {
    /// Really a `SOCK_SEQPACKET` socket; the datagram type is the one that
    /// sendfd sends on, and it asks for nothing that differs.
    socket: UnixDatagram,
}

/// A received frame and the fd that came with it.
#[derive(Debug)]
pub struct Packet<M> {
    /// The message.
    pub frame: M,
    /// The fd, close-on-exec.
    pub fd: Option<OwnedFd>,
    /// An fd came along, and this process had no free descriptor for it.
    pub lost_fd: bool,
}

/// Why a connection to the fd socket is of no more use.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum FrameError {
    #[error("the fd socket")]
    Io(#[from] io::Error),
    #[error("a frame of more than {FRAME_BYTES} bytes")]
    TooLong,
    #[error("more fds than the one that a frame may carry")]
    TooManyFds,
    #[error("a packet that is not a frame")]
    Malformed(#[from] prost::DecodeError),
}

impl FrameSocket {
    /// Connects to a daemon's fd socket. Never waits: a Unix socket connects
    /// at once or not at all.
    ///
    /// # Errors
    /// The cause, as [`io::Error`].
    pub fn connect(path: &Path) -> io::Result<FrameSocket> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        FrameSocket::new(socket)
    }

    /// Takes a connected `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// The cause, as [`io::Error`].
    pub fn new(socket: OwnedFd) -> io::Result<FrameSocket> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(FrameSocket {
            socket: UnixDatagram::from_std(net::UnixDatagram::from(socket))?,
        })
    }

    /// Sends one frame, and a copy of `fd` with it.
    ///
    /// # Errors
    /// [`FrameError::TooLong`], or the cause as [`FrameError::Io`].
    pub async fn send(
        &self,
        frame: &impl Message,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrameError> {
        let bytes = frame.encode_to_vec();
        if bytes.len() > FRAME_BYTES {
            return Err(FrameError::TooLong);
        }
        loop {
            self.socket.writable().await?;
            match send_packet(&self.socket, &bytes, fd) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Receives one frame; `None` when the peer has closed.
    ///
    /// # Errors
    /// [`FrameError`]; whatever fds came along are closed.
    pub async fn receive<M: Message + Default>(&self) -> Result<Option<Packet<M>>, FrameError> {
        let mut bytes = [0; FRAME_BYTES];
        let raw = match self.next_packet(&mut bytes).await {
            // When the peer closed while frames of ours were unread, the kernel
            // says so once, and only then hands out what the peer had sent.
            Err(cause) if cause.kind() == io::ErrorKind::ConnectionReset => {
                self.next_packet(&mut bytes).await?
            }
            received => received?,
        };
        // Cut with room left: it is this process that has no descriptor free.
        let lost_fd = raw.cut_fds && raw.fds.len() < FD_SLOTS;
        if (raw.cut_fds && !lost_fd) || raw.fds.len() > 1 {
            return Err(FrameError::TooManyFds);
        }
        if raw.cut_bytes {
            return Err(FrameError::TooLong);
        }
        // The protocol has no empty frame: zero bytes are the end.
        if raw.len == 0 {
            return Ok(None);
        }
        let frame = M::decode(&bytes[..raw.len])?;
        Ok(Some(Packet {
            frame,
            fd: raw.fds.into_iter().next(),
            lost_fd,
        }))
    }

    async fn next_packet(&self, bytes: &mut [u8]) -> io::Result<RawPacket> {
        let receive = || receive_packet(&self.socket, bytes);
        self.socket.async_io(Interest::READABLE, receive).await
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What one `recvmsg` brought; the fds are owned from the first moment.
struct RawPacket {
    len: usize,
    fds: Vec<OwnedFd>,
    cut_bytes: bool,
    cut_fds: bool,
}

fn send_packet(socket: &UnixDatagram, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let sent = match fd {
        // sendfd cannot be told MSG_NOSIGNAL; Rust programs ignore SIGPIPE.
        Some(fd) => socket.send_with_fd(bytes, &[fd.as_raw_fd()])?,
        None => socket.try_io(Interest::WRITABLE, || {
            Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)?)
        })?,
    };
    assert_eq!(sent, bytes.len(), "a packet is sent whole or not at all");
    Ok(())
}

fn receive_packet(socket: &UnixDatagram, bytes: &mut [u8]) -> io::Result<RawPacket> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_SLOTS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(bytes)];
    let received = rustix::net::recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(RawPacket {
        len: received.bytes,
        fds: fds.flatten().collect(),
        cut_bytes: received.flags.contains(ReturnFlags::TRUNC),
        cut_fds: received.flags.contains(ReturnFlags::CTRUNC),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{ClientFrame, Detach, Hello, client_frame::Body};

    fn pair() -> (FrameSocket, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let (left, right) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        (FrameSocket::new(left).unwrap(), right)
    }

    fn hello() -> ClientFrame {
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            agent: "test".into(),
        };
        ClientFrame {
            request_id: 7,
            body: Some(Body::Hello(hello)),
        }
    }

    /// Fds of this process that refer to the memfd of that name.
    fn open_fds_of(name: &str) -> usize {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        targets
            .filter(|target| target.to_string_lossy().contains(name))
            .count()
    }

    #[tokio::test]
    async fn a_frame_arrives_with_its_fd_which_closes_on_exec() {
        let (left, right) = pair();
        let right = FrameSocket::new(right).unwrap();
        let file = memfd("frame-one");
        left.send(&hello(), Some(file.as_fd())).await.unwrap();
        let packet = right.receive::<ClientFrame>().await.unwrap().unwrap();
        assert_eq!(packet.frame, hello());
        let flags = rustix::io::fcntl_getfd(packet.fd.unwrap()).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[tokio::test]
    async fn the_end_of_a_connection_is_not_an_error() {
        let (left, right) = pair();
        drop(right);
        assert!(left.receive::<ClientFrame>().await.unwrap().is_none());
        // And sending into it is an error, not a signal.
        assert!(matches!(
            left.send(&hello(), None).await,
            Err(FrameError::Io(_))
        ));
    }

    #[tokio::test]
    async fn the_last_words_of_a_peer_that_did_not_listen_still_arrive() {
        let (left, right) = pair();
        left.send(&hello(), None).await.unwrap();
        let words = hello().encode_to_vec();
        rustix::net::send(&right, &words, SendFlags::empty()).unwrap();
        drop(right);
        let packet = left.receive::<ClientFrame>().await.unwrap();
        assert_eq!(packet.unwrap().frame, hello());
        assert!(left.receive::<ClientFrame>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn surplus_fds_are_refused_and_closed() {
        let (left, right) = pair();
        let right = net::UnixDatagram::from(right);
        let file = memfd("frame-surplus");
        for count in [2, 3, 64] {
            let fds = vec![file.as_raw_fd(); count];
            right.send_with_fd(&hello().encode_to_vec(), &fds).unwrap();
            assert!(
                matches!(
                    left.receive::<ClientFrame>().await,
                    Err(FrameError::TooManyFds)
                ),
                "{count}"
            );
        }
        assert_eq!(open_fds_of("frame-surplus"), 1);
    }

    #[tokio::test]
    async fn a_long_or_senseless_packet_is_refused() {
        let (left, right) = pair();
        rustix::net::send(&right, &[0; FRAME_BYTES + 1], SendFlags::empty()).unwrap();
        assert!(matches!(
            left.receive::<ClientFrame>().await,
            Err(FrameError::TooLong)
        ));
        rustix::net::send(&right, &[0xff; 16], SendFlags::empty()).unwrap();
        assert!(matches!(
            left.receive::<ClientFrame>().await,
            Err(FrameError::Malformed(_))
        ));
        let long = Hello {
            agent: "x".repeat(FRAME_BYTES),
            ..Hello::default()
        };
        let long = ClientFrame {
            request_id: 1,
            body: Some(Body::Hello(long)),
        };
        assert!(matches!(
            left.send(&long, None).await,
            Err(FrameError::TooLong)
        ));
        // The connection still works.
        let detach = ClientFrame {
            request_id: 2,
            body: Some(Body::Detach(Detach {})),
        };
        rustix::net::send(&right, &detach.encode_to_vec(), SendFlags::empty()).unwrap();
        assert_eq!(
            left.receive::<ClientFrame>().await.unwrap().unwrap().frame,
            detach
        );
    }

    fn memfd(name: &str) -> OwnedFd {
        rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }
}
