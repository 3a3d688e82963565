//! What the kernel tells of a denial, by a record or by what nftables logged, as an event; and what many of them come
//! to.

mod callers;
mod filter;
pub(crate) mod kept;
mod summary;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

#[cfg(test)]
pub(crate) use self::callers::{MAPPED_USERS, USERS};
pub(crate) use self::{
    callers::{Budget, Budgets, Caller, Place, other_owner},
    filter::Filter,
    summary::Summary,
};
use crate::{
    backend::LoggedDenial,
    host::Identities,
    wire::{ActiveBackend, Denial, Protocol, Schema, Verdict, rfc3339},
};

use enforcer_ebpf::{Address, EventRecord, NO_UID, UDP, is_v4};

/// Reads a record; `boot` is the time at which `CLOCK_BOOTTIME` was zero.
#[must_use]
pub(crate) fn read(record: &EventRecord, boot: SystemTime) -> Denial {
    let port = u16::from_be(record.port);
    let dialled = match record.family {
        4 => IpAddr::V4(Ipv4Addr::from(u32::from_be(first(record.dialled)))),
        _ => IpAddr::V6(v6(record.dialled)),
    };
    let judged = if is_v4(record.judged) {
        v6(record.judged).to_canonical()
    } else {
        IpAddr::V6(v6(record.judged))
    };
    let name_end = record
        .task
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(record.task.len());
    let time = boot + Duration::from_nanos(record.time);
    Denial {
        schema: Schema::Event,
        time: rfc3339(time),
        verdict: if record.verdict == enforcer_ebpf::Verdict::WouldDeny as u8 {
            Verdict::WouldDeny
        } else {
            Verdict::Deny
        },
        backend: ActiveBackend::Ebpf,
        pid: Some(record.pid),
        tid: Some(record.tid),
        comm: Some(String::from_utf8_lossy(record.task.get(..name_end).unwrap_or_default()).into_owned()),
        kernel_thread: record.kernel_thread == 1,
        task_uid: Some(record.task_uid),
        task_user: None,
        socket_uid: (record.socket_uid != NO_UID).then_some(record.socket_uid),
        socket_user: None,
        cgroup_id: Some(record.cgroup),
        cgroup: None,
        netns_cookie: Some(record.netns),
        source: None,
        protocol: if record.protocol == UDP {
            Protocol::Udp
        } else {
            Protocol::Tcp
        },
        dialled: SocketAddr::new(dialled, port).to_string(),
        judged: SocketAddr::new(judged, port).to_string(),
        target: record.target.as_str().to_owned(),
        generation: record.generation,
    }
}

/// Reads a denial of nftables, logged just before `now`.
#[must_use]
pub(crate) fn read_logged(denial: &LoggedDenial, now: SystemTime) -> Denial {
    Denial {
        schema: Schema::Event,
        time: rfc3339(now),
        verdict: if denial.denied {
            Verdict::Deny
        } else {
            Verdict::WouldDeny
        },
        backend: ActiveBackend::Nftables,
        pid: None,
        tid: None,
        comm: None,
        kernel_thread: false,
        task_uid: None,
        task_user: None,
        socket_uid: denial.user,
        socket_user: None,
        cgroup_id: None,
        cgroup: None,
        netns_cookie: None,
        source: Some(denial.from.to_string()),
        protocol: denial.protocol,
        dialled: denial.to.to_string(),
        judged: denial.to.to_string(),
        target: denial.target.clone(),
        generation: denial.generation,
    }
}

/// Names users and cgroup, as they are now.
pub(crate) fn identify(event: &mut Denial, identities: &mut Identities, now: Instant) {
    event.task_user = identities.name_of(event.task_uid);
    event.socket_user = identities.name_of(event.socket_uid);
    event.cgroup = identities.path_of(event.cgroup_id, event.pid, now);
}

/// The time at which `CLOCK_BOOTTIME` was zero, by the wall clock of now.
pub(crate) fn boot_time() -> std::io::Result<SystemTime> {
    let since = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    Ok(SystemTime::now() - Duration::from(since))
}

fn v6(address: Address) -> Ipv6Addr {
    let [a, b, c, d] = address.map(u32::from_be).map(u128::from);
    Ipv6Addr::from(a << 96 | b << 64 | c << 32 | d)
}

fn first([word, ..]: Address) -> u32 {
    word
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A denial of a user's, by a program.
    pub(crate) fn denial(uid: u32, target: &str, comm: &str) -> Denial {
        Denial {
            schema: Schema::Event,
            time: String::new(),
            verdict: Verdict::Deny,
            backend: ActiveBackend::Ebpf,
            pid: None,
            tid: None,
            comm: Some(comm.to_owned()),
            kernel_thread: false,
            task_uid: Some(uid),
            task_user: None,
            socket_uid: Some(uid),
            socket_user: None,
            cgroup_id: None,
            cgroup: None,
            netns_cookie: None,
            source: None,
            protocol: Protocol::Tcp,
            dialled: String::new(),
            judged: "127.0.0.1:2822".to_owned(),
            target: target.to_owned(),
            generation: 1,
        }
    }
}
