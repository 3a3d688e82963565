//! Starts a program from which some system calls are taken, by seccomp: as in containers and on kernels that lack them.

use std::{collections::BTreeMap, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// Takes system calls from a program.
#[derive(Parser)]
struct Cli {
    /// Every bpf(2) fails: as container engines forbid it, or as a kernel without it does
    #[arg(long, value_enum)]
    no_bpf: Option<Forbidden>,
    /// No netlink socket to netfilter is to be had, as on a kernel without it
    #[arg(long)]
    no_netfilter: bool,
    /// Socket buffers stay as small as they are: what would force them larger does nothing
    #[arg(long)]
    small_buffers: bool,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Forbidden {
    Eperm,
    Enosys,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn main() -> Result<()> {
    let cli = Cli::parse();
    if let Some(how) = cli.no_bpf {
        let errno = match how {
            Forbidden::Eperm => libc::EPERM,
            Forbidden::Enosys => libc::ENOSYS,
        };
        take(Rules::from([(libc::SYS_bpf, Vec::new())]), errno)?;
    }
    if cli.no_netfilter {
        let rule = SeccompRule::new(vec![is(0, libc::AF_NETLINK)?, is(2, libc::NETLINK_NETFILTER)?])?;
        take(Rules::from([(libc::SYS_socket, vec![rule])]), libc::EPROTONOSUPPORT)?;
    }
    if cli.small_buffers {
        let force =
            |option| SeccompRule::new(vec![is(1, libc::SOL_SOCKET)?, is(2, option)?]).map_err(anyhow::Error::from);
        let rules = vec![force(libc::SO_SNDBUFFORCE)?, force(libc::SO_RCVBUFFORCE)?];
        // Of an error number 0 the call knows only that it was not made.
        take(Rules::from([(libc::SYS_setsockopt, rules)]), 0)?;
    }
    let Some((program, arguments)) = cli.command.split_first() else {
        bail!("no program");
    };
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("run {}", program.display()))
}

fn is(argument: u8, value: i32) -> Result<SeccompCondition> {
    let value = u64::from(value.cast_unsigned());
    Ok(SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        value,
    )?)
}

fn take(rules: Rules, errno: i32) -> Result<()> {
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        std::env::consts::ARCH.try_into()?,
    )?;
    apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(())
}
