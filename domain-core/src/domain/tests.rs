//! The domain against its promises.
