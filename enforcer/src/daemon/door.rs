//! The control socket while the daemon runs: callers are served, and where another process has removed its file, it is
//! made again.

use tokio::{sync::mpsc, task::JoinHandle};
use tracing::warn;

use crate::control::{self, Call, ControlSocket};

/// Requests that may wait for the loop.
const CALLS: usize = 64;

/// Where callers come in.
pub(super) struct Door {
    socket: ControlSocket,
    calls: mpsc::Sender<Call>,
    serving: JoinHandle<()>,
}

impl Door {
    /// Has callers served; their requests are received by the loop.
    pub(super) fn open(socket: ControlSocket) -> (Self, mpsc::Receiver<Call>) {
        let (call, calls) = mpsc::channel(CALLS);
        let serving = tokio::spawn(control::serve(socket.listener(), call.clone()));
        let door = Self {
            socket,
            calls: call,
            serving,
        };
        (door, calls)
    }

    /// Makes the socket again if its file is gone or another one. Why that fails, if it does.
    pub(super) fn keep_open(&mut self) -> Option<String> {
        if self.socket.is_reachable() {
            return None;
        }
        let path = self.socket.path();
        match control::listen(path) {
            Ok(socket) => {
                warn!("another process removed {}; it is made again", path.display());
                self.serving.abort();
                self.serving = tokio::spawn(control::serve(socket.listener(), self.calls.clone()));
                self.socket = socket;
                None
            }
            Err(error) => Some(format!("{error}; commands do not reach the daemon until this works")),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
