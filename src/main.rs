//! cocoon-net: see the library.
fn main() {}
