//! B4: what was so when a grant was made or asked for, and is no longer: the year that the clock shows, whose number it
//! is.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use enforcer::{
    grants::{self, Grantee, Grants, Key, Term},
    policy::Uid,
};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt},
    },
    unistd::Pid,
};

use super::{
    Case,
    grants::lasting,
    hardship::{enforces, guarded},
};
use crate::{
    backend::EBPF,
    world::{Attack, NOBODY, binary, ran, slowness, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(b4_no_grant_outlasts_its_length_by_a_clock_set_back),
        case!(b4_a_grant_goes_to_no_process_that_got_the_callers_number).on(EBPF),
    ]
}

/// The host's clock is not ours to set: what a start finds was written by one that showed another year.
fn b4_no_grant_outlasts_its_length_by_a_clock_set_back() -> Result<()> {
    const YEAR: Duration = Duration::from_hours(365 * 24);
    let (world, _listener) = guarded()?;
    let short = Duration::from_secs(5) * slowness();
    let now = SystemTime::now();
    let term = |since: SystemTime, expires: Option<SystemTime>| -> Result<Term> {
        Ok(Term {
            since: since.try_into()?,
            expires: expires.map(TryInto::try_into).transpose()?,
            ..lasting()
        })
    };
    let (ahead, long_ago) = (now + YEAR, now - YEAR);
    let all = [
        (2001, term(ahead, Some(ahead + short))?),
        (2002, term(ahead, None)?),
        (2003, term(long_ago, Some(long_ago + short))?),
        (2004, term(long_ago, Some(now + YEAR))?),
        (2005, term(long_ago, None)?),
    ];
    let mut book = Grants::default();
    for (user, term) in &all {
        let key = Key {
            target: "main".to_owned(),
            to: Grantee::User(Uid(*user)),
        };
        book.grant(key, term.clone())?;
    }
    grants::save(&world.path("state"), &book)?;
    let _daemon = world.daemon()?;
    let started = Instant::now();
    for user in [2001, 2002, 2004, 2005] {
        world.attack(user).reaches()?;
    }
    world.attack(2003).is_refused()?;
    until("what was granted for seconds ends", || {
        Ok(world.attack(2001).run()?.errno.is_some())
    })?;
    let took = started.elapsed();
    ensure!(
        took < short + Duration::from_secs(3) * slowness(),
        "only after {took:?}"
    );
    for user in [2002, 2004, 2005] {
        world.attack(user).reaches()?;
    }
    enforces(&world)
}

/// Whether the kernel remembers the process at the other end of a socket, not its number alone (Linux 6.5).
fn remembers_processes() -> Result<bool> {
    let (here, _there) = UnixStream::pair()?;
    Ok(!matches!(
        getsockopt(&here, sockopt::PeerPidfd),
        Err(Errno::ENOPROTOOPT)
    ))
}

/// What a shell prints in the process and mount namespace of a process; its arguments are paths.
fn inside(pid: &str, paths: &[PathBuf], script: &str) -> Result<String> {
    let mut command = Command::new("nsenter");
    command.args(["--target", pid, "--pid", "--mount", "sh", "-ec", script, "sh"]);
    Ok(ran(command.args(paths))?.demand(0)?.stdout)
}

/// A caller asks for its own cgroup and ends before the daemon looks; a process in another cgroup gets its number.
fn b4_a_grant_goes_to_no_process_that_got_the_callers_number() -> Result<()> {
    let (world, _listener) = guarded()?;
    let (callers, others) = (world.cgroup.join("caller"), world.cgroup.join("other"));
    for cgroup in [&callers, &others] {
        fs::create_dir(cgroup)?;
    }
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(binary("enforcer")?);
    let daemon = world.daemon_with(&mut command)?;
    let children = format!("/proc/{0}/task/{0}/children", daemon.pid());
    let pid: i32 = fs::read_to_string(children)?.trim().parse()?;
    let paths = [
        callers.clone(),
        others.clone(),
        binary("enforcer")?,
        world.path("enforcer.toml"),
        world.path("run/control.sock"),
    ];
    let number = pid.to_string();
    let by = |cgroup: &Path| -> Attack { world.attack(NOBODY).in_cgroup(cgroup) };
    for cgroup in [&callers, &others] {
        by(cgroup).is_refused()?;
    }
    inside(
        &number,
        &paths,
        "echo $$ > \"$1/cgroup.procs\"; exec \"$3\" --config \"$4\" grant main",
    )?;
    by(&callers).reaches()?;
    by(&others).is_refused()?;
    world.enforcer(&["revoke", "main", "--all"])?.demand(0)?;
    by(&callers).is_refused()?;

    let before = daemon.log().len();
    kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
    let numbers = inside(
        &number,
        &paths,
        "echo $$ > \"$1/cgroup.procs\"\n\
         \"$3\" --config \"$4\" grant main > /dev/null 2>&1 & caller=$!\n\
         until [ \"$(grep -cF \"$5\" /proc/net/unix)\" -ge 2 ]; do sleep 0.05; done; sleep 0.5\n\
         kill -9 $caller; wait $caller || true\n\
         echo $((caller - 1)) > /proc/sys/kernel/ns_last_pid\n\
         sh -c 'echo $$ > \"$1/cgroup.procs\"; exec sleep 60' sh \"$2\" > /dev/null 2>&1 &\n\
         echo $caller $!\n\
         until grep -q . \"$2/cgroup.procs\"; do sleep 0.05; done",
    );
    kill(Pid::from_raw(pid), Signal::SIGCONT)?;
    let numbers = numbers?;
    let same = numbers.split_whitespace().collect::<Vec<_>>();
    ensure!(
        same.len() == 2 && same.first() == same.last(),
        "the number was not used again, this proves nothing: {numbers}"
    );
    let mut log = String::new();
    until("the request is answered", || {
        log = daemon.log().split_off(before);
        Ok(log.contains("granted") || log.contains("grant main"))
    })?;
    if remembers_processes()? {
        ensure!(log.contains("does not exist"), "{log}");
        by(&others).is_refused()?;
        by(&callers).is_refused()?;
        let grants = world.enforcer(&["grants"])?.demand(0)?.stdout;
        ensure!(grants.contains("no grants"), "{grants}");
    } else {
        // B4 says so of these kernels.
        by(&others).reaches()?;
    }
    Ok(())
}
