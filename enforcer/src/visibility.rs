//! Whether what an instance keeps outlives its process and is found by other processes: it must lie where the host sees
//! it (F1). And whether it covers the whole host (F9).

use std::{
    fmt,
    path::{Path, PathBuf},
};

use crate::{
    config::Settings,
    host::{
        hierarchy,
        mounts::{HostView, Views},
    },
};

/// What must outlive the process, or be found by another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asset {
    /// Pins, which keep links and maps.
    Pins,
    /// Saved rules, names and grants.
    State,
    /// The control socket, by which commands find the daemon.
    Socket,
    /// The cgroup hierarchy, in which commands and the next start find cgroups.
    Cgroups,
}

/// What the host does not have where this process has it. Its text is for people: what is so, what comes of it, what to
/// do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hidden {
    /// What it is.
    pub kept: Asset,
    /// Where it is.
    pub path: PathBuf,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Visibility {
    /// What the host does not see.
    pub hidden: Vec<Hidden>,
    /// Why it could not be determined, if so.
    pub unknown: Option<String>,
    /// The cgroup that eBPF is on without being asked for, which is not the true root: processes elsewhere are not
    /// covered (F9).
    pub part: Option<PathBuf>,
}

impl Visibility {
    /// Looks at what an instance keeps: pins and the cgroup where it enforces with eBPF, the socket where a daemon
    /// runs.
    #[must_use]
    pub(crate) fn of(settings: &Settings, ebpf_on: Option<&Path>, daemon: bool) -> Self {
        let mut all = vec![(Asset::State, settings.state_dir.as_path())];
        if daemon {
            all.push((Asset::Socket, &settings.socket));
        }
        if let Some(cgroup) = ebpf_on {
            all.extend([(Asset::Pins, settings.pin_dir.as_path()), (Asset::Cgroups, cgroup)]);
        }
        let part = ebpf_on.filter(|cgroup| settings.cgroup.is_none() && !hierarchy::is_root(cgroup));
        let mut found = Self {
            part: part.map(Path::to_path_buf),
            ..Self::default()
        };
        let views = Views::read();
        for (kept, path) in all {
            match views.seen_by_host(path) {
                HostView::Same => {}
                HostView::Other => found.hidden.push(Hidden {
                    kept,
                    path: path.into(),
                }),
                HostView::Unknown(why) => found.unknown = Some(why),
            }
        }
        found
    }

    /// What is wrong, in one text; none where nothing is known to be.
    #[must_use]
    pub(crate) fn fault(&self) -> Option<String> {
        let part = self.part.as_ref().map(|cgroup| {
            format!(
                "only processes below cgroup {} are covered: the root of the cgroup v2 hierarchy is not mounted here; \
                 run enforcer in the \
                 host's cgroup and mount namespace, or set cgroup to this path if no more is meant",
                cgroup.display()
            )
        });
        let all: Vec<String> = part
            .into_iter()
            .chain(self.hidden.iter().map(ToString::to_string))
            .collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

impl fmt::Display for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.kept {
            Asset::Pins => write!(
                f,
                "pin directory {path} is on a bpffs that exists only in this mount namespace: enforcement ends with \
                 the namespace, and commands \
                 outside it do not see it; mount the bpffs on the host (mount -t bpf bpf /sys/fs/bpf), then restart \
                 enforcer"
            ),
            Asset::State => write!(
                f,
                "state directory {path} is a different one on the host: a start outside this mount namespace does not \
                 find the saved rules; \
                 set state_dir to a directory that the host shares"
            ),
            Asset::Socket => write!(
                f,
                "control socket {path} is not visible on the host: commands outside this mount namespace do not reach \
                 the daemon; set \
                 socket to a path that the host shares"
            ),
            Asset::Cgroups => write!(
                f,
                "cgroup {path} is not visible on the host: commands outside this mount namespace do not find it; mount \
                 cgroup v2 on the \
                 host"
            ),
        }
    }
}
