//! Another user has the directories of the state and the socket before enforcer starts, and works there (F6): answers
//! in its place, mounts a file system, comes by files of root's. Nobody believes it, and enforcement starts as ever.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Case;
use crate::{
    attack::as_user,
    world::{Listener, NOBODY, World, until},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case!(f6_who_answers_on_a_users_socket_is_asked_nothing),
        case!(f6_a_users_file_system_on_ours_is_unmounted),
        case!(f6_a_file_of_roots_vouches_for_no_users_directory),
    ]
}

/// A world whose state and socket lie in a directory that all may write.
struct Open {
    world: World,
    _listener: Listener,
    state: PathBuf,
    run: PathBuf,
}

impl Open {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let listener = world.listen()?;
        world.attack(NOBODY).reaches()?;
        let open = world.path("open");
        fs::create_dir(&open)?;
        fs::set_permissions(&open, fs::Permissions::from_mode(0o1777))?;
        world.configure_one(&[format!("tcp://{}", world.here())], r#"["root"]"#)?;
        let file = world.path("enforcer.toml");
        let mut toml = fs::read_to_string(&file)?;
        let [state, run] = ["state", "run"].map(|name| {
            let text = |path: PathBuf| path.display().to_string();
            toml = toml.replace(&text(world.path(name)), &text(open.join(name)));
            open.join(name)
        });
        fs::write(&file, toml)?;
        Ok(Self {
            world,
            _listener: listener,
            state,
            run,
        })
    }

    fn squat(&self) -> Result<()> {
        for dir in [&self.state, &self.run] {
            as_user(NOBODY, || fs::create_dir(dir))??;
        }
        Ok(())
    }

    /// A daemon starts, all is guarded, and both directories are its own.
    fn works(&self) -> Result<()> {
        let _daemon = self.world.daemon()?;
        self.world.attack(NOBODY).is_refused()?;
        self.world.attack(0).reaches()?;
        ensure!(
            self.world.status()?["daemon"]["running"] == true,
            "the daemon is not asked"
        );
        for (dir, ours) in [(&self.state, "last-good.json"), (&self.run, "control.sock")] {
            let meta = fs::symlink_metadata(dir)?;
            ensure!(
                meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o7777 == 0o700,
                "{}: {meta:?}",
                dir.display()
            );
            ensure!(dir.join(ours).exists(), "{ours} is missing");
        }
        Ok(())
    }
}

/// Says of everything that it is done, as long as somebody asks; returns what it was asked.
fn lie(listener: &UnixListener) -> Vec<String> {
    let mut asked = Vec::new();
    while let Ok((mut stream, _)) = listener.accept() {
        let mut line = String::new();
        if let Ok(mut copy) = stream.try_clone().map(BufReader::new)
            && copy.read_line(&mut line).is_ok()
            && !line.is_empty()
        {
            asked.push(line);
            let _ = stream.write_all(b"{\"reply\":\"done\"}\n");
        }
        if asked.last().is_some_and(|line| line.starts_with("end")) {
            break;
        }
    }
    asked
}

fn f6_who_answers_on_a_users_socket_is_asked_nothing() -> Result<()> {
    let open = Open::new()?;
    let world = &open.world;
    open.squat()?;
    let socket = open.run.join("control.sock");
    let listener = as_user(NOBODY, || UnixListener::bind(&socket))??;
    let liar = thread::spawn(move || lie(&listener));
    // Nothing is active, and that is what is said.
    let status = world.enforcer(&["status"])?.demand(1)?;
    let named = format!("{} belongs to user {NOBODY}, not root", socket.display());
    ensure!(status.stderr.contains(&named), "{status:?}");
    world.apply()?;
    world.attack(NOBODY).is_refused()?;
    let status = world.enforcer(&["status"])?.demand(0)?;
    ensure!(status.stderr.contains(&named), "{status:?}");
    for command in ["refresh", "events"] {
        let refused = world.enforcer(&[command])?.demand(2)?;
        ensure!(refused.stderr.contains(&named), "{command}: {refused:?}");
    }
    for words in [&["grants"][..], &["events", "--summary"]] {
        let said = world.enforcer(words)?.demand(0)?.stderr;
        ensure!(said.matches(&named).count() == 1, "{words:?}: {said}");
    }
    let unloaded = world.enforcer(&["unload"])?.demand(0)?;
    ensure!(unloaded.stderr.contains(&named), "{unloaded:?}");
    world.attack(NOBODY).reaches()?;
    // It has listened all the time, and heard nothing.
    std::os::unix::net::UnixStream::connect(&socket)?.write_all(b"end\n")?;
    let asked = liar.join().ok().context("the thread panicked")?;
    ensure!(asked == ["end\n"], "it was asked {asked:?}");
    open.works()
}

/// Unmounted when dropped.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        while umount2(self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    }
}

/// As fusermount3(1) does it for a user, but that no program answers: root is not let in (fuse(4)).
fn fuse(dir: &Path) -> Result<File> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .context("open /dev/fuse (modprobe fuse)")?;
    let options = format!(
        "fd={},rootmode=40000,user_id={NOBODY},group_id={NOBODY}",
        device.as_raw_fd()
    );
    mount(
        Some("squat"),
        dir,
        Some("fuse"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )?;
    Ok(device)
}

fn f6_a_users_file_system_on_ours_is_unmounted() -> Result<()> {
    let open = Open::new()?;
    open.squat()?;
    let _mounted = [Mounted(&open.state), Mounted(&open.run)];
    let _devices = [fuse(&open.state)?, fuse(&open.run)?, fuse(&open.run)?];
    let closed = fs::metadata(&open.state).err().and_then(|error| error.raw_os_error());
    ensure!(closed == Some(libc::EACCES), "root is let in: {closed:?}");
    open.world.enforcer(&["status"])?.demand(1)?;
    open.works()
}

fn f6_a_file_of_roots_vouches_for_no_users_directory() -> Result<()> {
    let open = Open::new()?;
    open.squat()?;
    // What a service of root's would leave there, and more than can be looked through while nothing is guarded.
    for dir in [&open.state, &open.run] {
        fs::write(dir.join("log"), "root's")?;
        as_user(NOBODY, || {
            (0..2000).try_for_each(|number| fs::create_dir(dir.join(number.to_string())))
        })??;
    }
    open.works()?;
    let left = || -> Result<Vec<PathBuf>> {
        let parent = open.state.parent().context("no parent")?;
        let entries = fs::read_dir(parent)?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<Vec<_>>>()?;
        Ok(entries
            .into_iter()
            .filter(|path| *path != open.state && *path != open.run)
            .collect())
    };
    // It lies beside them, as it was.
    let left = left()?;
    ensure!(left.len() == 2, "{left:?}");
    for dir in left {
        let meta = fs::symlink_metadata(&dir)?;
        ensure!(
            meta.uid() == NOBODY && fs::read_dir(&dir)?.count() == 2001,
            "{}",
            dir.display()
        );
    }
    until("nothing is active", || Ok(open.world.enforcer(&["unload"])?.code == 0))
}
