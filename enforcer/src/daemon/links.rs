//! Looks whether the links are there, by a thread that does nothing else: each takes as long as the kernel makes it
//! (F10). It is woken by a channel that holds no lock then: from the pool of the runtime, and from a channel of the
//! standard library, it would have to wait once more for one.

use std::{io, thread};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::warn;

use crate::backend::{LinkLook, LinksSeen};

/// At most one look at a time.
#[derive(Debug, Default)]
pub(super) struct LinkLooks {
    thread: Option<LookThread>,
    is_under_way: bool,
}

/// Ends once nobody can ask it.
#[derive(Debug)]
struct LookThread {
    looks: UnboundedSender<LinkLook>,
    seen: UnboundedReceiver<LinksSeen>,
}

impl LinkLooks {
    /// Has a look taken, unless one still is.
    pub(super) fn begin(&mut self, look: LinkLook) {
        if self.is_under_way {
            return;
        }
        let thread = self.thread.take().map_or_else(LookThread::start, Ok);
        match thread {
            Ok(thread) => {
                self.is_under_way = thread.looks.send(look).is_ok();
                self.thread = self.is_under_way.then_some(thread);
            }
            Err(error) => warn!("start a thread that looks at the links: {error}; it is tried again"),
        }
    }

    /// Waits until one has been taken; for ever where none is under way.
    pub(super) async fn next(&mut self) -> LinksSeen {
        if let Some(thread) = &mut self.thread {
            let seen = thread.seen.recv().await;
            self.is_under_way = false;
            match seen {
                Some(seen) => return seen,
                // It ended by itself: the next look has another one.
                None => self.thread = None,
            }
        }
        std::future::pending().await
    }
}

impl LookThread {
    fn start() -> io::Result<Self> {
        let (looks, mut asked) = unbounded_channel::<LinkLook>();
        let (found, seen) = unbounded_channel();
        let work = move || {
            while let Some(look) = asked.blocking_recv() {
                if found.send(look.take()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("links".to_owned()).spawn(work)?;
        Ok(Self { looks, seen })
    }
}
