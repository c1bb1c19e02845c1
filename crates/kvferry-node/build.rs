//! Link flags that Node needs of an addon.
fn main() {
    napi_build::setup();
}
