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
        comm: Some(until_zero(&record.task)),
        exe: path_of(record),
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
        exe: None,
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

/// The path of the program, as far as the record tells it; none where it does not.
fn path_of(record: &EventRecord) -> Option<String> {
    let components = record.path.iter().zip(record.lengths).take(record.components.into());
    let mut path = match (record.components, record.rooted) {
        (0, _) => return None,
        (_, 0) => "…".to_owned(),
        _ => String::new(),
    };
    for (bytes, length) in components.rev() {
        let length = usize::from(length);
        let name = until_zero(bytes.get(..length).unwrap_or(bytes));
        path.push('/');
        path.push_str(&name);
        // What was not read, or is longer than there is room for.
        if length > bytes.len() || name.is_empty() {
            path.push('…');
        }
    }
    Some(path)
}

fn until_zero(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
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
    use zerocopy::FromZeros as _;

    use super::*;

    /// The last component first, and how long it really is.
    fn path(rooted: u8, components: &[(&[u8], u8)]) -> Option<String> {
        let mut record = EventRecord::new_zeroed();
        record.rooted = rooted;
        record.components = u8::try_from(components.len()).unwrap_or(u8::MAX);
        let into = record.path.iter_mut().zip(&mut record.lengths);
        for ((bytes, length), (name, real)) in into.zip(components) {
            // What an earlier record left there.
            bytes.fill(b'x');
            bytes.iter_mut().zip(*name).for_each(|(to, from)| *to = *from);
            *length = *real;
        }
        path_of(&record)
    }

    #[test]
    fn a_programs_path_is_whole_or_says_what_is_left_out() {
        let check = |rooted, components: &[(&[u8], u8)], want: &str| {
            assert_eq!(path(rooted, components).as_deref(), Some(want));
        };
        assert_eq!(path(0, &[]), None);
        check(1, &[(b"curl", 4), (b"bin", 3), (b"usr", 3)], "/usr/bin/curl");
        check(1, &[(b"memfd:a", 7)], "/memfd:a");
        check(0, &[(b"curl", 4), (b"bin", 3)], "…/bin/curl");
        // Longer than there is room for; not to be read; changed while it was read.
        check(1, &[(&[b'a'; 40], 41)], &format!("/{}…", "a".repeat(40)));
        check(1, &[(&[b'a'; 40], 40)], &format!("/{}", "a".repeat(40)));
        check(1, &[(b"curl", 4), (b"\0", 33)], "/…/curl");
        check(1, &[(b"a\0bc", 4)], "/a");
        check(1, &[(b"a\xff\x1b", 3)], "/a\u{fffd}\u{1b}");
        // More than a record has room for, as no program writes.
        let many = [(&b"a"[..], 1); 9];
        check(0, &many, "…/a/a/a/a/a/a/a/a");
    }

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
            exe: None,
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
