//! Durable writes and locks.
//!
//! A file is replaced whole or not at all: written beside its place, synced, renamed over it, and the folder synced
//! (`rename(2)`, `fsync(2)`). Locks are `flock(2)`: they end with the process that holds them, however it ends.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::stat::{major, minor};

/// Extended attribute of the folders that we made (`xattr(7)`).
const MADE_BY_US: &str = "user.cocoon-net.made";

/// How the names of files begin that are being written.
const SCRATCH_PREFIX: &str = ".cocoon-net-";

/// Mode of the state folder.
pub const STATE_FOLDER_MODE: u32 = 0o750;

/// How long a command waits for another to let go of a lock.
pub const LOCK_WAIT: Duration = Duration::from_secs(3);

/// Held while the host is configured and the state saved, so that the daemon never compares a half-changed host.
pub const HOST_LOCK: &str = "/run/cocoon-net.lock";

/// The daemon's PID, locked by it for as long as it lives.
pub const PID_FILE: &str = "/run/cocoon-net.pid";

/// Why a file could not be read, written, removed or locked.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A system call on a file or folder failed.
    #[error("cannot {doing} {}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{} is in use by {holder}; wait for it to end, then try again", .path.display())]
    Locked {
        /// The locked file or folder.
        path: PathBuf,
        /// Who holds it, as far as the kernel tells.
        holder: Holder,
    },
}

impl FileError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

/// The process that holds a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its PID, when the kernel tells.
    pub pid: Option<i32>,
}

impl Holder {
    /// Its command line (`proc_pid_cmdline(5)`); empty when it cannot be read.
    #[must_use]
    pub fn argv(&self) -> Vec<String> {
        let words = self.pid.and_then(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok()).unwrap_or_default();
        let words = words.strip_suffix(b"\0").unwrap_or(&words);
        if words.is_empty() {
            return Vec::new();
        }
        words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(pid) = self.pid else { return f.write_str("another process") };
        let line = self.argv().join(" ");
        if line.is_empty() { write!(f, "PID {pid}") } else { write!(f, "`{line}` (PID {pid})") }
    }
}

/// Reads a file; `None` when there is none.
///
/// # Errors
/// [`FileError::Io`] when it is there but cannot be read.
pub fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::io("read", path)(error)),
    }
}

/// Replaces a file so that, whatever happens, it holds either the old or the new contents, and the new ones once this
/// returns. The folder must exist.
///
/// # Errors
/// [`FileError::Io`]; the old contents are then still in place.
pub fn write_durably(path: &Path, contents: &[u8], mode: u32) -> Result<(), FileError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> io::Result<()> {
        remove_scratch_of(path);
        let mut file = tempfile::Builder::new().prefix(&scratch_prefix(path)).tempfile_in(folder)?;
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.write_all(contents)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(FileError::io("write", path))
}

/// How the names begin under which a file is written before it takes its place.
fn scratch_prefix(path: &Path) -> String {
    format!("{SCRATCH_PREFIX}{}-", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Whether this is the name of a file that was being written, and that a killed process has left.
#[must_use]
pub fn is_scratch(name: &str) -> bool {
    name.starts_with(SCRATCH_PREFIX)
}

/// Removes what killed processes left of writing this file. Nobody else is writing it: each file has a lock or an owner.
fn remove_scratch_of(path: &Path) {
    let prefix = scratch_prefix(path);
    for entry in path.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Makes a folder and those above it that are missing. Each is marked, so that [`remove_made_folders`] knows it again.
///
/// # Errors
/// [`FileError::Io`] when one cannot be made.
pub fn make_folders(path: &Path, mode: u32) -> Result<(), FileError> {
    let missing: Vec<&Path> = path.ancestors().take_while(|folder| is_missing(folder)).collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(mode).create(folder) {
            // On a file system without extended attributes the folder will stay behind.
            Ok(()) => {
                // Whatever the umask says.
                fs::set_permissions(folder, Permissions::from_mode(mode)).map_err(FileError::io("make", folder))?;
                let _ = rustix::fs::setxattr(folder, MADE_BY_US, b"1", rustix::fs::XattrFlags::empty());
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(FileError::io("make the folder", folder)(error)),
        }
    }
    Ok(())
}

/// Removes a folder and those above it as far as they are marked as ours and empty.
pub fn remove_made_folders(path: &Path) {
    let marked = |folder: &&Path| rustix::fs::getxattr(*folder, MADE_BY_US, &mut [0_u8; 1]).is_ok();
    for folder in path.ancestors().take_while(marked) {
        // ENOTEMPTY is the answer for a folder that somebody else uses: it stays.
        if fs::remove_dir(folder).is_err() {
            return;
        }
    }
}

fn is_missing(folder: &Path) -> bool {
    !folder.as_os_str().is_empty() && !folder.exists()
}

/// Checks that files can be made in a folder, by making and removing one.
///
/// # Errors
/// [`FileError::Io`] when they cannot: a read-only or full file system, say.
pub fn check_writable(folder: &Path) -> Result<(), FileError> {
    let probe = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(SCRATCH_PREFIX).tempfile_in(folder)?;
        file.write_all(&[0; 4096])?;
        file.as_file().sync_all()
    };
    probe().map_err(FileError::io("write to", folder))
}

/// Removes a file, and what was to replace it. Returns whether there was one.
///
/// # Errors
/// [`FileError::Io`] when it is there and stays.
pub fn remove(path: &Path) -> Result<bool, FileError> {
    remove_scratch_of(path);
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(FileError::io("remove", path)(error)),
    }
}

/// An exclusive lock on the state folder itself: one command at a time changes this node.
#[derive(Debug)]
pub struct StateLock {
    _folder: File,
}

impl StateLock {
    /// Takes the lock, waiting for at most `wait`.
    ///
    /// # Errors
    /// [`FileError::Locked`] names who holds it; [`FileError::Io`] when the folder cannot be opened.
    pub async fn acquire(folder: &Path, wait: Duration) -> Result<Self, FileError> {
        let deadline = Instant::now() + wait;
        loop {
            let handle = File::open(folder).map_err(FileError::io("open", folder))?;
            wait_for(&handle, folder, deadline.saturating_duration_since(Instant::now())).await?;
            // A teardown that held the lock may have removed the folder.
            if is_still_at(&handle, folder) {
                return Ok(Self { _folder: handle });
            }
        }
    }
}

/// An exclusive lock on a file of its own, which is there only while the lock is held.
#[derive(Debug)]
pub struct LockFile {
    file: File,
    path: PathBuf,
}

impl LockFile {
    /// Takes the lock, waiting for at most `wait`.
    ///
    /// # Errors
    /// [`FileError::Locked`] names who holds it; [`FileError::Io`] when the file cannot be made.
    pub async fn acquire(path: &Path, wait: Duration) -> Result<Self, FileError> {
        let deadline = Instant::now() + wait;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                .open(path)
                .map_err(FileError::io("open", path))?;
            wait_for(&file, path, deadline.saturating_duration_since(Instant::now())).await?;
            if is_still_at(&file, path) {
                return Ok(Self { file, path: path.to_owned() });
            }
        }
    }

    /// Replaces the contents of the locked file.
    ///
    /// # Errors
    /// [`FileError::Io`] when they cannot be written.
    pub fn write(&mut self, contents: &str) -> Result<(), FileError> {
        let write = |file: &mut File| -> io::Result<()> {
            file.set_len(0)?;
            file.write_all(contents.as_bytes())
        };
        write(&mut self.file).map_err(FileError::io("write", &self.path))
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Removed while still locked: whoever waits on this inode sees that the path no longer leads to it.
        let _ = fs::remove_file(&self.path);
    }
}

/// The daemon that a PID file stands for: who holds its lock, or, for a daemon that takes no lock (the Go program's),
/// the live process of our name that it holds the PID of. Anything else is a stale file.
///
/// # Errors
/// [`FileError::Io`] when the file is there but cannot be read.
pub fn daemon(pid_file: &Path) -> Result<Option<Holder>, FileError> {
    let Some(contents) = read_optional(pid_file)? else { return Ok(None) };
    let written = String::from_utf8_lossy(&contents).trim().parse::<i32>().ok().filter(|pid| *pid > 0);
    let file = match File::open(pid_file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::io("open", pid_file)(error)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(written.filter(|pid| is_cocoon_net(*pid)).map(|pid| Holder { pid: Some(pid) })),
        Err(TryLockError::WouldBlock) => Ok(Some(Holder { pid: holder_of(&file).pid.or(written) })),
        Err(TryLockError::Error(error)) => Err(FileError::io("lock", pid_file)(error)),
    }
}

fn is_cocoon_net(pid: i32) -> bool {
    let own = i32::try_from(std::process::id()) == Ok(pid);
    // The kernel cuts the name after 15 bytes (`proc_pid_comm(5)`); ours has 10.
    !own && fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "cocoon-net")
}

async fn wait_for(file: &File, path: &Path, wait: Duration) -> Result<(), FileError> {
    let deadline = Instant::now() + wait;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(FileError::Locked { path: path.to_owned(), holder: holder_of(file) });
            }
            Err(TryLockError::Error(error)) => return Err(FileError::io("lock", path)(error)),
        }
    }
}

fn is_still_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => ours.dev() == there.dev() && ours.ino() == there.ino(),
        _ => false,
    }
}

/// Looks the holder up in `/proc/locks` (`proc_locks(5)`): `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`.
fn holder_of(file: &File) -> Holder {
    let pid = file.metadata().ok().and_then(|metadata| {
        let device = metadata.dev();
        let place = format!("{:02x}:{:02x}:{}", major(device), minor(device), metadata.ino());
        let locks = fs::read_to_string("/proc/locks").ok()?;
        locks.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().filter(|word| *word != "->").collect();
            let (kind, pid, locked) = (words.get(1)?, words.get(4)?, words.get(5)?);
            let ours = *kind == "FLOCK" && !line.contains("->") && *locked == place;
            ours.then(|| pid.parse::<i32>().ok()).flatten().filter(|pid| *pid > 0)
        })
    });
    Holder { pid }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_replaces_the_file_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.json");
        write_durably(&path, b"old", 0o644).unwrap();
        write_durably(&path, b"new", 0o644).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_writer_left_goes_with_the_next_write_and_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.json");
        let others = dir.path().join(".cocoon-net-leases.json-x");
        fs::write(&others, "").unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().count();
        for _ in 0..2 {
            fs::write(dir.path().join(".cocoon-net-pool.json-Ab12"), "half").unwrap();
            write_durably(&path, b"whole", 0o644).unwrap();
            assert_eq!(names(), 2);
        }
        fs::write(dir.path().join(".cocoon-net-pool.json-Cd34"), "half").unwrap();
        assert!(remove(&path).unwrap());
        assert!(names() == 1 && others.exists());
    }

    #[test]
    fn folders_that_we_made_go_again_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        let ours = theirs.join("a/b");
        make_folders(&ours, 0o750).unwrap();
        assert_eq!(fs::metadata(&ours).unwrap().mode() & 0o777, 0o750);
        fs::write(ours.join("used"), "").unwrap();
        remove_made_folders(&ours);
        assert!(ours.exists(), "somebody uses it");
        fs::remove_file(ours.join("used")).unwrap();
        remove_made_folders(&ours);
        assert!(theirs.exists() && fs::read_dir(&theirs).unwrap().next().is_none());
    }

    #[test]
    fn a_failed_write_names_the_file() {
        let error = write_durably(Path::new("/nonexistent/pool.json"), b"", 0o644).unwrap_err();
        assert_eq!(error.to_string(), "cannot write /nonexistent/pool.json");
    }

    #[tokio::test]
    async fn the_state_lock_names_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::acquire(dir.path(), Duration::ZERO).await.unwrap();
        let error = StateLock::acquire(dir.path(), Duration::from_millis(30)).await.unwrap_err();
        assert!(error.to_string().contains(&format!("PID {}", std::process::id())), "{error}");
        drop(held);
        StateLock::acquire(dir.path(), Duration::ZERO).await.unwrap();
    }

    #[tokio::test]
    async fn a_lock_file_is_gone_when_let_go_and_a_stale_one_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.pid");
        fs::write(&path, "4711\n").unwrap();
        assert_eq!(daemon(&path).unwrap(), None);

        let mut lock = LockFile::acquire(&path, Duration::ZERO).await.unwrap();
        lock.write("1\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        assert_eq!(daemon(&path).unwrap().unwrap().pid, i32::try_from(std::process::id()).ok());
        assert!(matches!(LockFile::acquire(&path, Duration::ZERO).await, Err(FileError::Locked { .. })));
        drop(lock);
        assert!(!path.exists());
    }
}
