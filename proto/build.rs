//! Generates the wire types from `domaind/v1/*.proto`, without an installed
//! protoc: protox parses, prost and tonic generate, pbjson adds proto3 JSON.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const PROTOS: [&str; 6] = [
    "domaind/v1/types.proto",
    "domaind/v1/domain.proto",
    "domaind/v1/mapping.proto",
    "domaind/v1/session.proto",
    "domaind/v1/admin.proto",
    "domaind/v1/fdsocket.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors = protox::compile(PROTOS, ["."])?;
    let encoded = descriptors.encode_to_vec();
    fs::write(out.join("descriptors.bin"), &encoded)?;
    // The codec that the generated code uses: with it the messages of a
    // pipeline are used again.
    tonic_prost_build::configure()
        .btree_map(".")
        .codec_path("crate::codec::MessageCodec")
        .compile_fds(descriptors)?;
    // Zeros are written, too: `.usage.sessions` shall not be absent for scripts.
    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .btree_map([".domaind.v1"])
        .emit_fields()
        .build(&[".domaind.v1"])?;
    println!("cargo:rerun-if-changed=domaind");
    Ok(())
}
