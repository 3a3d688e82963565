//! A connection that is opened and then only held, to see what becomes of it.

use std::{
    io,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use socket2::SockAddr;

use super::{
    Attempt, Way, check,
    dial::{defer, make, mapped},
};

/// Says `held` once the call is made, answered or not, and `errno NUMBER` when the connection fails.
#[allow(clippy::wildcard_enum_match_arm, reason = "all other ways are dialled as they are")]
pub(super) fn hold(attempt: &Attempt) -> io::Result<()> {
    let socket = make(attempt)?;
    socket.set_nonblocking(true)?;
    let to = match attempt.way {
        Way::Mapped | Way::MptcpMapped | Way::UdpMapped => mapped(attempt.destination),
        Way::FastOpenConnect => {
            defer(&socket)?;
            attempt.destination
        }
        _ => attempt.destination,
    };
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // Where somebody answers, the answer comes at once.
    let patience = Instant::now() + Duration::from_millis(200);
    while socket.peer_addr().is_err() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("held");
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    loop {
        // SAFETY: one entry, as said; it asks for errors, which are always told.
        check(unsafe { libc::poll(&raw mut poll, 1, -1) })?;
        if let Some(error) = socket.take_error()? {
            println!("errno {}", error.raw_os_error().unwrap_or(-1));
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
