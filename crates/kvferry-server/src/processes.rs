//! Which processes of this machine have the other end of a connection: a peer that was given up can touch the pool until they
//! have ended, whatever becomes of the connection.

use std::fs;
use std::net::{IpAddr, SocketAddr};

/// A process, told from later ones of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pid: u32,
    /// In the system's ticks.
    started: u64,
}

impl Process {
    /// `None` when it has ended, or is not to be seen from here.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // A name may have anything in it.
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        // Nobody may fetch what has ended; a first thread's end is not yet its process'.
        let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let has_ended = matches!(state, "Z" | "X") && threads() < 2;
        (!has_ended).then_some(Self { pid, started })
    }

    pub(crate) fn has_ended(self) -> bool {
        Self::of(self.pid) != Some(self)
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone)]
pub(crate) enum Whence {
    /// Its process is known.
    Process(Process),
    /// From one address to the other.
    Tcp {
        from: SocketAddr,
        to: SocketAddr,
    },
    Unknown,
}

impl Whence {
    /// The processes of the other end; none when they are not to be found. Looks at all processes: not for a thread that serves.
    pub(crate) fn processes(&self) -> Vec<Process> {
        match self {
            Self::Process(process) => vec![*process],
            Self::Tcp { from, to } => inode(*from, *to).map_or_else(Vec::new, holders),
            Self::Unknown => Vec::new(),
        }
    }
}

/// The socket that is bound to `from` and connected to `to`.
fn inode(from: SocketAddr, to: SocketAddr) -> Option<u64> {
    let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
    let wanted = (canonical(from), canonical(to));
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|file| {
        let table = fs::read_to_string(file).ok()?;
        table.lines().skip(1).find_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            let ends = (address(fields.next()?)?, address(fields.next()?)?);
            let inode = fields.nth(6)?.parse().ok()?;
            (ends == wanted && inode != 0).then_some(inode)
        })
    })
}

/// As the kernel writes it: words of the address in this machine's order, in hexadecimal.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = address.get(8 * at..8 * at + 8)?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    let ip = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words: Option<Vec<[u8; 4]>> = (0..4).map(word).collect();
            IpAddr::from(<[u8; 16]>::try_from(words?.concat()).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?))
}

/// The processes that have the socket open.
fn holders(inode: u64) -> Vec<Process> {
    let socket = format!("socket:[{inode}]");
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files
            .filter_map(|file| fs::read_link(file.path()).ok())
            .any(|link| link.to_str() == Some(&*socket))
    })
    .filter_map(Process::of)
    .collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    use super::*;

    #[test]
    fn the_process_of_a_connections_other_end_is_found() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, from) = listener.accept().unwrap();
            let whence = Whence::Tcp { from, to: far.local_addr().unwrap() };
            let this = Process::of(std::process::id()).unwrap();
            assert_eq!(whence.processes(), [this], "{host}");
            drop(near);
            assert!(whence.processes().is_empty(), "{host}: nobody has it any more");
        }
    }

    #[test]
    fn a_process_has_ended_when_it_is_a_zombie_too() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(!process.has_ended());
        let other = Process { started: process.started + 1, ..process };
        assert!(other.has_ended(), "another of the same number");
        child.kill().unwrap();
        while !process.has_ended() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(process.has_ended());
    }
}
