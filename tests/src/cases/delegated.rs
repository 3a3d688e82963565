//! F6: a cgroup that a user can make anew, or move into, matches nobody, whoever named it: the configuration, or a
//! grant.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Case;
use crate::{
    backend::ALL,
    kernel::CGROUP_NEEDS,
    world::{Attack, Daemon, Listener, NOBODY, Ran, World, cgroup_mount, ran, until},
};

pub(super) fn cases() -> Vec<Case> {
    let cases = [
        case!(f6_a_granted_cgroup_made_again_by_a_user_lets_nobody_in),
        case!(f6_a_configured_cgroup_made_again_by_a_user_matches_nobody),
        case!(f6_what_a_user_can_write_unmatches_within_a_second),
        case!(f6_a_threaded_cgroup_is_no_exception),
        case!(f6_a_users_cgroup_is_not_granted),
    ];
    cases.map(|case| case.on(ALL).needs(CGROUP_NEEDS)).into()
}

/// A job's cgroup in one that is to be a user's, both root's at first.
struct Delegated {
    world: World,
    _listener: Listener,
    users: PathBuf,
    job: PathBuf,
}

impl Delegated {
    fn new(allow: impl FnOnce(&str) -> String) -> Result<Self> {
        let world = World::new()?;
        let (users, job) = (world.cgroup.join("u"), world.cgroup.join("u/job"));
        fs::create_dir_all(&job)?;
        let listener = world.listen()?;
        world.attack(NOBODY).in_cgroup(&job).reaches()?;
        world.configure(&format!(
            "[target.main]\nendpoints = [\"tcp://{}\"]\nallow = {}\ngrants = true\n",
            world.here(),
            allow(&path_of(&job)?)
        ))?;
        Ok(Self {
            world,
            _listener: listener,
            users,
            job,
        })
    }

    /// Where only grants let anybody in.
    fn granted() -> Result<(Self, Daemon)> {
        let this = Self::new(|_| r#"["root"]"#.to_owned())?;
        let daemon = this.world.daemon()?;
        this.inside().is_refused()?;
        this.grant()?.demand(0)?;
        this.inside().reaches()?;
        Ok((this, daemon))
    }

    fn grant(&self) -> Result<Ran> {
        self.world
            .enforcer(&["grant", "main", "--cgroup", &path_of(&self.job)?])
    }

    fn inside(&self) -> Attack {
        self.world.attack(NOBODY).in_cgroup(&self.job)
    }

    /// As systemd does for `user@.service` and `Delegate=yes`.
    fn delegate(&self, to: u32) -> Result<()> {
        for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            chown(self.users.join(file), Some(to), Some(to))?;
        }
        Ok(())
    }

    /// The job ends, and the user whose the cgroup above is takes its place.
    fn taken_over(&self) -> Result<()> {
        self.delegate(NOBODY)?;
        fs::remove_dir(&self.job)?;
        let script = "echo $$ > \"$1/cgroup.procs\" && exec setpriv --reuid \"$2\" --regid \"$2\" --clear-groups \
            sh -c 'mkdir \"$1/job\" && echo $$ > \"$1/job/cgroup.procs\" && cat /proc/self/cgroup' sh \"$1\"";
        let mut user = Command::new("sh");
        user.args(["-c", script, "sh"]).arg(&self.users).arg(NOBODY.to_string());
        let at = ran(&mut user)?.demand(0)?.stdout;
        ensure!(
            at.contains("/u/job"),
            "the user did not get in, this proves nothing: {at}"
        );
        Ok(())
    }

    fn lets_nobody_in(&self) -> Result<()> {
        // Also once it was looked at anew: before that it is not known by its new id.
        until("it is said that the cgroup matches nobody", || {
            let status = self.world.status()?;
            Ok(status["state"] == "degraded" && status["causes"].to_string().contains("matches nobody"))
        })?;
        self.inside().is_refused()?;
        let doctor: Value = serde_json::from_str(&self.world.enforcer(&["doctor", "--json"])?.stdout)?;
        let found = doctor["findings"].to_string();
        ensure!(found.contains("\"cgroup-writable\""), "{found}");
        self.world.attack(0).reaches()
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        for cgroup in [self.job.join("threads"), self.job.clone(), self.users.clone()] {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

fn path_of(cgroup: &Path) -> Result<String> {
    Ok(format!("/{}", cgroup.strip_prefix(cgroup_mount()?)?.display()))
}

fn f6_a_granted_cgroup_made_again_by_a_user_lets_nobody_in() -> Result<()> {
    let (delegated, _daemon) = Delegated::granted()?;
    delegated.taken_over()?;
    delegated.lets_nobody_in()?;
    let grants = delegated.world.enforcer(&["grants", "--json"])?.demand(0)?.stdout;
    let grants: Value = serde_json::from_str(&grants)?;
    let writable = grants["grants"][0]["cgroup_writable"]
        .as_str()
        .context("no word of it")?;
    ensure!(writable.contains(&format!("user {NOBODY}")), "{grants}");
    let shown = delegated.world.enforcer(&["grants"])?.demand(0)?.stdout;
    ensure!(shown.contains("allows nobody"), "{shown}");
    Ok(())
}

fn f6_a_configured_cgroup_made_again_by_a_user_matches_nobody() -> Result<()> {
    let delegated = Delegated::new(|path| format!("[\"root\", {{ user = {NOBODY}, cgroup = {path:?} }}]"))?;
    let daemon = delegated.world.daemon()?;
    delegated.world.attack(NOBODY).is_refused()?;
    delegated.inside().reaches()?;
    delegated.taken_over()?;
    delegated.lets_nobody_in()?;
    // Root's again, all of it, it matches again.
    fs::remove_dir(&delegated.job)?;
    delegated.delegate(0)?;
    fs::create_dir(&delegated.job)?;
    until("root's cgroup matches", || {
        Ok(delegated.inside().run()?.errno.is_none())
    })?;
    ensure!(
        delegated.world.status()?["state"] == "enforcing",
        "{}",
        delegated.world.status()?
    );
    // A start that finds it a user's is no failure, and lets nobody in either.
    delegated.delegate(NOBODY)?;
    delegated.world.enforcer(&["unload"])?.demand(0)?;
    drop(daemon);
    let _daemon = delegated.world.daemon()?;
    delegated.lets_nobody_in()
}

fn f6_what_a_user_can_write_unmatches_within_a_second() -> Result<()> {
    let (delegated, _daemon) = Delegated::granted()?;
    for file in [
        "u",
        "u/cgroup.procs",
        "u/cgroup.threads",
        "u/job",
        "u/job/cgroup.procs",
        "u/job/cgroup.threads",
    ] {
        let path = delegated.world.cgroup.join(file);
        let mode = fs::metadata(&path)?.permissions().mode() & 0o7777;
        let set = |uid, mode| -> Result<()> {
            chown(&path, Some(uid), None)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            Ok(())
        };
        for (uid, mode) in [(NOBODY, mode), (0, mode | 0o020), (0, mode | 0o002)] {
            set(uid, mode)?;
            let refused = || Ok(delegated.inside().run()?.errno.is_some());
            until(&format!("{file} of {uid} with {mode:o} unmatches"), refused)?;
            set(0, mode & !0o022)?;
            until("root's alone it matches again", || {
                Ok(delegated.inside().run()?.errno.is_none())
            })?;
        }
    }
    Ok(())
}

fn f6_a_threaded_cgroup_is_no_exception() -> Result<()> {
    let (delegated, _daemon) = Delegated::granted()?;
    let threads = delegated.job.join("threads");
    fs::create_dir(&threads)?;
    fs::write(threads.join("cgroup.type"), "threaded")?;
    let path = path_of(&threads)?;
    let world = &delegated.world;
    world.enforcer(&["revoke", "main", "--all"])?.demand(0)?;
    delegated.inside().is_refused()?;
    world.enforcer(&["grant", "main", "--cgroup", &path])?.demand(0)?;
    let inside = || world.attack(NOBODY).in_cgroup(&threads);
    inside().reaches()?;
    delegated.inside().is_refused()?;
    chown(threads.join("cgroup.threads"), Some(NOBODY), None)?;
    until("a user's thread file unmatches", || Ok(inside().is_refused().is_ok()))
}

fn f6_a_users_cgroup_is_not_granted() -> Result<()> {
    let delegated = Delegated::new(|_| r#"["root"]"#.to_owned())?;
    let _daemon = delegated.world.daemon()?;
    delegated.delegate(NOBODY)?;
    let said = delegated.grant()?.demand(2)?.stderr;
    ensure!(
        said.contains("may not be granted") && said.contains(&format!("user {NOBODY}'s")),
        "{said}"
    );
    delegated.inside().is_refused()?;
    let grants = delegated.world.enforcer(&["grants"])?.demand(0)?.stdout;
    ensure!(grants.contains("no grants"), "{grants}");
    Ok(())
}
