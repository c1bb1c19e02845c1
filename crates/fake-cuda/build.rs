//! Names the library as the driver is named, and keeps it in memory once it is loaded: a program that looks
//! whether there is a driver, and closes it again, would take the worker thread's code away.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1,-z,nodelete");
}
