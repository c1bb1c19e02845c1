//! A connection to a server: requests, deadlines, heartbeat, mapping of its pool
