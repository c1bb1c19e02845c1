//! ZMTP 3.x and the LMCache protocol, sans-IO: bytes in, values out, limits before allocation
