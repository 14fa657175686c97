//! gRPC calls of bytes that no generated client would send.

use prost::bytes::{Buf, BufMut};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;

use crate::raw::with_token;
use crate::refusal::{Refused, answer};

/// A unary call of `domaind.v1.{method}`, byte by byte; `method` is
/// `Service/Rpc`.
///
/// # Panics
/// If the channel does not take calls.
pub async fn call(
    channel: Channel,
    method: &str,
    message: Vec<u8>,
    token: Option<&str>,
) -> Refused<Vec<u8>> {
    let path = format!("/domaind.v1.{method}");
    let path = PathAndQuery::try_from(path).expect("a path");
    let request = match token {
        Some(token) => with_token(message, token),
        None => tonic::Request::new(message),
    };
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("a channel that takes calls");
    answer(grpc.unary(request, path, Verbatim).await)
}

/// A call that streams messages to the daemon, byte by byte.
///
/// # Panics
/// If the channel does not take calls.
pub async fn stream(
    channel: Channel,
    method: &str,
    messages: Vec<Vec<u8>>,
    token: Option<&str>,
) -> Refused<Vec<u8>> {
    let path = format!("/domaind.v1.{method}");
    let path = PathAndQuery::try_from(path).expect("a path");
    let messages = tonic::codegen::tokio_stream::iter(messages);
    let request = match token {
        Some(token) => with_token(messages, token),
        None => tonic::Request::new(messages),
    };
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("a channel that takes calls");
    answer(grpc.client_streaming(request, path, Verbatim).await)
}

/// A message with fields behind it that nobody knows: a number, bytes, and
/// both fixed sizes, with large tags.
#[must_use]
pub fn with_unknown_fields(mut message: Vec<u8>) -> Vec<u8> {
    // Tag (field number << 3 | wire type), then the value; as varints.
    tag(&mut message, 1_000, 0);
    message.extend([0xff, 0xff, 0x03]);
    tag(&mut message, 1_001, 2);
    message.extend([5, 0, 1, 2, 0xff, 0xfe]);
    tag(&mut message, 1_002, 1);
    message.extend([0xee; 8]);
    tag(&mut message, 536_870_911, 5);
    message.extend([0xdd; 4]);
    message
}

/// A field that holds a message.
pub fn put_message(into: &mut Vec<u8>, field: u32, message: &[u8]) {
    tag(into, field, 2);
    varint(into, message.len() as u64);
    into.extend_from_slice(message);
}

fn tag(into: &mut Vec<u8>, field: u32, wire_type: u32) {
    varint(into, (u64::from(field) << 3) | u64::from(wire_type));
}

fn varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    into.push(value.to_le_bytes()[0]);
}

/// Bytes as they are.
#[derive(Clone, Copy, Debug)]
struct Verbatim;

impl Codec for Verbatim {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Verbatim;
    type Decoder = Verbatim;

    fn encoder(&mut self) -> Verbatim {
        Verbatim
    }

    fn decoder(&mut self) -> Verbatim {
        Verbatim
    }
}

impl Encoder for Verbatim {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Verbatim {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}
