//! F5, F6: other people's programs and users beside us.

use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, net::UnixListener, net::UnixStream},
};

use anyhow::{Result, ensure};

use super::Case;
use crate::{
    attack::as_user,
    backend::EBPF,
    foreign::{ForeignProgram, Sharing},
    kernel::EBPF_NEEDS,
    world::{Listener, NOBODY, World},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f5_programs_of_others_keep_running).on(EBPF),
        case!(f5_no_program_below_takes_our_place).needs(EBPF_NEEDS),
        case!(d1_f5_a_program_below_that_rewrites_is_caught).needs(EBPF_NEEDS),
        case!(f6_another_user_opens_nothing).on(EBPF),
        case!(f6_another_user_asks_nothing),
    ]
}

fn guarded() -> Result<(World, Listener)> {
    let world = World::new()?;
    let listener = world.listen()?;
    world.attack(NOBODY).reaches()?;
    world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
    Ok((world, listener))
}

fn f5_programs_of_others_keep_running() -> Result<()> {
    let (world, _listener) = guarded()?;
    let root = world.attack(0);
    let theirs = ForeignProgram::refusing(&world.cgroup, Sharing::Multi)?;
    root.is_refused()?;
    world.apply()?;
    root.is_refused()?;
    world.enforcer(&["unload"])?.demand(0)?;
    root.is_refused()?;
    drop(theirs);
    root.reaches()?;
    world.apply()?;
    let theirs = ForeignProgram::passing(&world.cgroup, Sharing::Multi)?;
    world.attack(NOBODY).is_refused()?;
    drop(theirs);
    world.attack(NOBODY).is_refused()?;
    root.reaches()
}

fn f5_no_program_below_takes_our_place() -> Result<()> {
    let (world, _listener) = guarded()?;
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let inside = world.attack(NOBODY).in_cgroup(&child);
    inside.reaches()?;
    world.apply()?;
    inside.is_refused()?;
    for sharing in [Sharing::None, Sharing::Override, Sharing::Multi] {
        let _theirs = ForeignProgram::passing(&child, sharing)?;
        inside.is_refused()?;
        world.attack(0).in_cgroup(&child).reaches()?;
    }
    inside.is_refused()
}

fn d1_f5_a_program_below_that_rewrites_is_caught() -> Result<()> {
    let (world, _listener) = guarded()?;
    let child = world.cgroup.join("child");
    fs::create_dir(&child)?;
    let IpAddr::V4(protected) = world.address() else {
        anyhow::bail!("the world's address is not IPv4");
    };
    let elsewhere = SocketAddr::new(Ipv4Addr::new(127, 1, 1, 1).into(), world.port);
    let inside = world.attack(NOBODY).in_cgroup(&child).to(elsewhere);
    world.apply()?;
    inside.reaches()?;
    let _theirs = ForeignProgram::rewriting(&child, Sharing::Multi, protected)?;
    inside.is_refused()?;
    world.attack(0).in_cgroup(&child).to(elsewhere).reaches()
}

fn f6_another_user_opens_nothing() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let ours = [
        world.pins(),
        world.pins().join("connect4"),
        world.path("run"),
        world.path("run/control.sock"),
    ];
    for path in &ours {
        fs::symlink_metadata(path)?;
        let seen = as_user(NOBODY, || File::open(path).map(drop).map_err(|error| error.kind()))?;
        ensure!(
            seen == Err(std::io::ErrorKind::PermissionDenied),
            "{}: {seen:?}",
            path.display()
        );
    }
    Ok(())
}

fn f6_another_user_asks_nothing() -> Result<()> {
    let (world, _listener) = guarded()?;
    let _daemon = world.daemon()?;
    let socket = world.path("run/control.sock");
    let open = world.path("open.sock");
    let _anybodys = UnixListener::bind(&open)?;
    fs::set_permissions(&open, fs::Permissions::from_mode(0o666))?;
    as_user(NOBODY, || UnixStream::connect(&open))??;
    let refused = as_user(NOBODY, || UnixStream::connect(&socket).map(drop))?;
    ensure!(
        refused
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied),
        "{refused:?}"
    );
    // Even where the modes were opened by mistake, the caller's user is asked.
    for (path, mode) in [(world.path("run"), 0o755), (socket.clone(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let answer = as_user(NOBODY, || crate::world::ask_raw(&socket, b"{\"request\":\"unload\"}\n"))?;
    ensure!(
        answer
            .as_ref()
            .is_ok_and(|answer| answer == "{\"error\":\"only root may ask\"}\n"),
        "{answer:?}"
    );
    world.attack(NOBODY).is_refused()
}
