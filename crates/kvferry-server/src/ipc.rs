//! A Unix socket: where LMCache's peers, which can show no token, find a server that is public elsewhere.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kvferry_core::{Error, ErrorCode, Result};

/// A listening socket at a path. Its directory keeps everybody but the owner away.
pub(crate) struct Socket {
    path: PathBuf,
    listener: UnixListener,
    /// Locked as long as the server lives: a socket whose lock is free was left by a dead one.
    _lock: File,
}

impl Socket {
    /// Listens at `path`; its directory is made where it is missing.
    pub(crate) fn bind(path: &Path) -> Result<Self> {
        let shown = path.display();
        let cannot = |error: io::Error| Error::system(format!("cannot listen at {shown}"), &error);
        let directory = path.parent().filter(|_| path.is_absolute() && path.file_name().is_some());
        let Some(directory) = directory else {
            let message =
                format!("ipc {shown} is no absolute path: give one, in a directory of its own");
            return Err(Error::invalid(message));
        };
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(cannot(error));
            }
            _ => {}
        }
        let mode = fs::metadata(directory).map_err(cannot)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(Error::invalid(format!(
                "ipc {shown}: others may enter its directory (mode {mode:03o}): give one of mode 0700"
            )));
        }
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let mut options = File::options();
        let lock = options.write(true).create(true).truncate(false).mode(0o600).open(lock);
        let lock = lock.map_err(cannot)?;
        if lock.try_lock().is_err() {
            return Err(Error::new(
                ErrorCode::AddressInUse,
                format!("a live server listens at {shown}; stop it, or choose another path"),
            ));
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path).map_err(cannot)?,
            Ok(_) => {
                let message = format!("ipc {shown} is there and no socket: give another path");
                return Err(Error::invalid(message));
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        Ok(Self { path: path.to_owned(), listener, _lock: lock })
    }

    /// For the runtime of the calling thread.
    pub(crate) fn listener(&self) -> Option<tokio::net::UnixListener> {
        tokio::net::UnixListener::from_std(self.listener.try_clone().ok()?).ok()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // the next server would do it
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_needs_a_directory_of_its_owner_and_replaces_only_a_dead_ones() {
        let base = std::env::temp_dir().join(format!("kvferry-ipc-{}", std::process::id()));
        fs::create_dir_all(&base).unwrap();
        let refused = |path: &Path| Socket::bind(path).err().unwrap();
        assert_eq!(refused(Path::new("relative/socket")).code, ErrorCode::InvalidArgument);
        fs::set_permissions(&base, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = refused(&base.join("socket"));
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(error.message.contains("mode 755"), "{error}");

        let path = base.join("own/socket");
        let live = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(base.join("own")).unwrap().mode() & 0o777, 0o700);
        assert_eq!(refused(&path).code, ErrorCode::AddressInUse);
        assert!(fs::symlink_metadata(&path).is_ok(), "the live one's stays");
        drop(live);
        assert!(fs::symlink_metadata(&path).is_err(), "it goes with its server");

        drop(UnixListener::bind(&path).unwrap()); // as a killed server leaves it
        drop(Socket::bind(&path).unwrap());
        fs::write(&path, "a file").unwrap();
        assert_eq!(refused(&path).code, ErrorCode::InvalidArgument);
        assert_eq!(fs::read(&path).unwrap(), b"a file");
        fs::remove_dir_all(base).unwrap();
    }
}
