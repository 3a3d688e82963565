//! The control socket: root only, one JSON line in, JSON lines out, every size and time bounded.

use std::{
    fs, io,
    os::{
        fd::AsFd as _,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use enforcer_client::Ask;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use crate::{
    host::own_dir,
    wire::{Reply, Request, Selector},
};

mod peer;

pub(crate) use enforcer_client::{AskError, ask::is_served};
pub(crate) use peer::{CgroupError, Peer};

/// Longest request, in bytes.
const MAX_REQUEST: u64 = 32 << 10;
/// How long a caller may take to ask, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a caller for whom there is no place may take to hear so.
const FULL_PATIENCE: Duration = Duration::from_millis(100);
/// Between two lines of the log that say that nobody can be accepted.
const QUIET: Duration = Duration::from_mins(1);
/// Callers served at once, and how many of them may be followers of events, who stay.
const MAX_CALLERS: usize = 32;
const MAX_FOLLOWERS: usize = 16;

/// A request on its way to the daemon's loop, and the way back.
#[derive(Debug)]
pub(crate) struct Call {
    pub request: Request,
    pub peer: Peer,
    /// Where the answer goes: replies, then closed.
    pub replies: mpsc::Sender<Reply>,
}

/// Why the control socket does not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// A file operation.
    #[error("{action} {}: {error}{}", path.display(), crate::host::remedy(error))]
    Io {
        action: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    /// Somebody else could replace the socket (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}; the socket's directory must be owned by root and writable \
             by root only", path.display())]
    Untrusted { path: PathBuf, uid: u32, mode: u32 },
    /// There is nothing that its directory could lie in.
    #[error("make {}: {error}; make the directory that it is to lie in, or name another socket", path.display())]
    NoPlace { path: PathBuf, error: io::Error },
    /// Another daemon answers there.
    #[error("{} is in use by another enforcer; reload that one (SIGHUP), stop it, or name another \
        socket", path.display())]
    Busy { path: PathBuf },
}

/// The control socket, bound. Its file goes with it, unless another one lies there by then.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: Arc<UnixListener>,
    path: PathBuf,
    id: Option<(u64, u64)>,
}

impl ControlSocket {
    /// Of a listener that is bound to a path.
    pub(crate) fn of(listener: UnixListener, path: &Path) -> Self {
        Self {
            listener: Arc::new(listener),
            path: path.into(),
            id: id_of(path),
        }
    }

    /// What callers connect to.
    pub(crate) fn listener(&self) -> Arc<UnixListener> {
        Arc::clone(&self.listener)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether callers find it: nobody has removed or replaced its file.
    pub(crate) fn is_reachable(&self) -> bool {
        self.id.is_some() && id_of(&self.path) == self.id
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if self.is_reachable() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what lies at a path.
fn id_of(path: &Path) -> Option<(u64, u64)> {
    let meta = fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}

/// Where the socket lies.
fn directory_of(socket: &Path) -> &Path {
    socket.parent().unwrap_or(Path::new("/"))
}

fn not_made(dir: &Path, error: io::Error) -> ControlError {
    let path = dir.into();
    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
        return ControlError::NoPlace { path, error };
    }
    ControlError::Io {
        action: "make",
        path,
        error,
    }
}

/// The socket's directory is root's alone (F6).
fn trust(dir: &Path) -> Result<(), ControlError> {
    let meta = fs::metadata(dir).map_err(|error| ControlError::Io {
        action: "look at",
        path: dir.into(),
        error,
    })?;
    if meta.uid() != 0 || meta.mode() & 0o022 != 0 {
        return Err(ControlError::Untrusted {
            path: dir.into(),
            uid: meta.uid(),
            mode: meta.mode() & 0o7777,
        });
    }
    Ok(())
}

/// Whether [`listen`] would find a place that it can use. Makes nothing.
pub(crate) fn check_usable(path: &Path) -> Result<(), ControlError> {
    let dir = directory_of(path);
    own_dir::check(dir, false).map_err(|error| not_made(dir, error))?;
    if own_dir::metadata(dir).is_ok_and(|found| found.is_some()) {
        trust(dir)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        return Err(ControlError::Io {
            action: "remove the old",
            path: path.into(),
            error: io::ErrorKind::IsADirectory.into(),
        });
    }
    Ok(())
}

/// Binds the socket, 0600 in a directory that nobody else can write (F6).
pub(crate) fn listen(path: &Path) -> Result<ControlSocket, ControlError> {
    let failed = |action| {
        move |error| ControlError::Io {
            action,
            path: path.into(),
            error,
        }
    };
    let dir = directory_of(path);
    own_dir::make(dir).map_err(|error| not_made(dir, error))?;
    trust(dir)?;
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ControlError::Busy { path: path.into() });
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove the old")(error)),
        Ok(()) | Err(_) => {}
    }
    let umask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(umask);
    let listener = listener.map_err(failed("bind"))?;
    let socket = ControlSocket::of(listener, path);
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed("set the mode of"))?;
    Ok(socket)
}

/// Fails where a daemon has the socket: it alone writes what is active, and would take ours for somebody's mischief.
pub(crate) fn ensure_socket_free(path: &Path) -> Result<(), ControlError> {
    if is_served(path) {
        return Err(ControlError::Busy { path: path.into() });
    }
    Ok(())
}

/// Accepts callers for ever and hands their requests to the loop.
pub(crate) async fn serve(listener: Arc<UnixListener>, calls: mpsc::Sender<Call>) {
    let places = Arc::new(Semaphore::new(MAX_CALLERS));
    let followers = Arc::new(Semaphore::new(MAX_FOLLOWERS));
    let mut logged: Option<Instant> = None;
    loop {
        match listener.accept().await {
            Ok((mut stream, _)) => {
                // A moment, as callers that are turned away hold a place until they have been told; no longer, as what
                // waited here would be carried out when its caller has long given up.
                let Ok(Ok(place)) = timeout(FULL_PATIENCE, places.clone().acquire_owned()).await else {
                    let full = format!("{MAX_CALLERS} callers are being served, which is the maximum; try again");
                    let _ = timeout(FULL_PATIENCE, send(&mut stream, &Reply::Error(full))).await;
                    continue;
                };
                let (calls, followers) = (calls.clone(), followers.clone());
                tokio::spawn(async move {
                    // A caller that hangs up is no fault of ours.
                    let _ = answer(stream, calls, followers).await;
                    drop(place);
                });
            }
            Err(error) => {
                // No descriptor may be free for long (F4).
                if logged.is_none_or(|logged| logged.elapsed() >= QUIET) {
                    tracing::warn!("accept on the control socket: {error}");
                    logged = Some(Instant::now());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks the daemon and returns its one answer.
pub(crate) async fn ask(path: &Path, request: &Request, patience: Duration) -> Result<Reply, AskError> {
    Ask::new(path, request, patience).answer().await
}

/// Asks the daemon and hands on each answer until it ends or `each` says so.
pub(crate) async fn ask_many(
    path: &Path,
    request: &Request,
    mut each: impl FnMut(Reply) -> io::Result<()>,
) -> Result<(), AskError> {
    let follows = matches!(request, Request::Events { follow: true, .. });
    let mut answers = Ask::new(path, request, PATIENCE).answers().await?;
    loop {
        let next = answers.next();
        let reply = if follows {
            next.await?
        } else {
            timeout(PATIENCE, next).await.map_err(|_| AskError::TimedOut {
                path: path.into(),
                patience: PATIENCE,
                request: Box::new(request.clone()),
            })??
        };
        let Some(reply) = reply else {
            if follows {
                // Nobody who watches takes its end for a quiet night.
                return Err(AskError::HungUp { path: path.into() });
            }
            break;
        };
        if each(reply).is_err() {
            break;
        }
    }
    Ok(())
}

async fn answer(mut stream: UnixStream, calls: mpsc::Sender<Call>, followers: Arc<Semaphore>) -> io::Result<()> {
    // The socket's mode keeps others out already; a descriptor handed on does not get round this (F6).
    let peer = Peer::of(&stream)?;
    if peer.uid != 0 {
        return send(&mut stream, &Reply::Error("only root may ask".to_owned())).await;
    }
    let mut line = Vec::new();
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read.take(MAX_REQUEST));
    let complete = timeout(PATIENCE, read.read_until(b'\n', &mut line))
        .await
        .is_ok_and(|read| read.is_ok())
        && line.ends_with(b"\n");
    let request = match serde_json::from_slice::<Request>(&line) {
        Ok(request) if complete => request,
        Ok(_) | Err(_) => {
            let error = format!(
                "a request is one line of JSON of at most {MAX_REQUEST} bytes, such as {{\"request\":\"status\"}}"
            );
            let mut text = serde_json::to_vec(&Reply::Error(error))?;
            text.push(b'\n');
            return write.write_all(&text).await;
        }
    };
    // A caller that only follows has nothing more to say; any other may close its half and wait.
    let follows = matches!(request, Request::Events { follow: true, .. });
    let single = !matches!(request, Request::Events { .. } | Request::Summary { .. });
    let Ok(_place) = follows.then(|| followers.try_acquire_owned()).transpose() else {
        let full = format!("{MAX_FOLLOWERS} callers follow events, which is the maximum; end one of them");
        return send(&mut stream, &Reply::Error(full)).await;
    };
    // For who has given up nothing is opened later (B4), nor another configuration taken. One that has closed its half
    // alone waits; a grant to the caller itself goes by its process.
    let matters = match &request {
        Request::Grant(asked) => asked.to != Selector::default(),
        Request::Unload | Request::Reload { dry_run: false } => true,
        Request::Status
        | Request::Refresh
        | Request::Events { .. }
        | Request::Summary { .. }
        | Request::Revoke(_)
        | Request::Grants
        | Request::Verify
        | Request::Reload { dry_run: true } => false,
    };
    if matters && has_hung_up(write.as_ref()) {
        return Ok(());
    }
    let (replies, mut receiver) = mpsc::channel(64);
    let call = Call { request, peer, replies };
    if calls.send(call).await.is_err() {
        return Ok(());
    }
    loop {
        let mut hung_up = [0; 1];
        tokio::select! {
            reply = receiver.recv() => match reply {
                Some(reply) => {
                    send(&mut stream, &reply).await?;
                    if single {
                        return Ok(());
                    }
                }
                None => return Ok(()),
            },
            read = stream.read(&mut hung_up), if follows => if !matches!(read, Ok(1..)) { return Ok(()) },
        }
    }
}

/// Whether the other end is closed altogether (poll(2), `POLLHUP`).
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut ends = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let found = poll(&mut ends, PollTimeout::ZERO).is_ok_and(|found| found > 0);
    let [end] = ends;
    found && end.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

async fn send(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let mut text = serde_json::to_vec(reply)?;
    text.push(b'\n');
    timeout(PATIENCE, stream.write_all(&text)).await?
}
