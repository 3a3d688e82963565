//! The second's tick, by a timer of the kernel's: it wakes the loop once. The runtime's own timers take two wake-ups
//! for a time so far away, as they are sorted twice.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd, RawFd},
    time::Duration,
};

use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Comes at once, and then at each period's end; those that were missed come as one.
#[derive(Debug)]
pub(super) struct Ticks(TimerFd);

impl Ticks {
    pub(super) fn every(period: Duration) -> io::Result<Self> {
        let timer = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC,
        )?;
        // Zero would stop it (timerfd_settime(2)).
        let at_once = Duration::from_nanos(1);
        let expiration = Expiration::IntervalDelayed(at_once.into(), period.into());
        timer.set(expiration, TimerSetTimeFlags::empty())?;
        Ok(Self(timer))
    }

    /// Takes those that came: the kernel counts the next period once this is done.
    pub(super) fn take(&mut self) {
        let _ = self.0.wait();
    }
}

impl AsRawFd for Ticks {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
