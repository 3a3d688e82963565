//! The status where no daemon answers: what the kernel holds and what was saved, for those who only read.

use std::{collections::BTreeMap, fmt, path::Path, time::Instant};

use enforcer_client::{AskError, ask};

use super::{Context, identify, status};
use crate::{
    backend::{self, ActiveRules, BackendError},
    config::{Backend, Settings},
    host::{self, Identities},
    policy::Name,
    resolve::{KnownName, protection},
    state,
    visibility::Visibility,
    wire::{ActiveBackend, Condition, ConditionId, NameStatus, Status},
};

/// What is active, as the kernel alone tells; and why a daemon that is there does not, if one is.
pub(crate) fn from_outside(settings: &Settings, silent: Option<&AskError>) -> Result<Status, BackendError> {
    let mount = || host::cgroup2_mount().ok().flatten();
    let cgroup = settings.cgroup.clone().or_else(mount).unwrap_or_default();
    let (active, unread) = ActiveRules::open_as_far_as_possible(settings)?;
    let mut observed = active
        .as_ref()
        .map(|active| active.observe(host::directory_id(&cgroup)))
        .transpose()?;
    if let Some(observed) = &mut observed {
        let mut identities = Identities::new(&mount().unwrap_or_default(), &BTreeMap::new());
        identify(observed, &mut identities, Instant::now());
    }
    let backend = active.as_ref().map(ActiveRules::backend);
    let hidden = backend.and_then(|backend| {
        let ebpf_on = backend.has_ebpf().then_some(cgroup.as_path());
        Visibility::of(settings, ebpf_on, false).fault()
    });
    let unheard = silent.map(ToString::to_string).or_else(|| {
        let holder = backend::daemon_of(&settings.state_dir)?;
        Some(format!(
            "{holder} holds {}, and does not answer on {}: commands do not reach it; restart it",
            settings.state_dir.display(),
            settings.socket.display()
        ))
    });
    let context = Context {
        cgroup: cgroup.display().to_string(),
        pin_dir: settings.pin_dir.display().to_string(),
        nft_table: settings.nft_table.clone(),
        state_dir: settings.state_dir.display().to_string(),
        socket: settings.socket.display().to_string(),
        backend: backend.unwrap_or(ActiveBackend::Ebpf),
        unread: unread.is_some(),
        names: backend.and_then(|_| saved_names(settings)).unwrap_or_default(),
        daemon: silent.and_then(|_| ask::listener(&settings.socket)),
        conditions: unheard
            .map(|why| ConditionId::DaemonNotAnswering.because(why))
            .into_iter()
            .chain(
                unread
                    .iter()
                    .map(|error| ConditionId::Unreadable.because(error.to_string())),
            )
            .chain(hidden.map(|hidden| ConditionId::HiddenFromHost.because(hidden)))
            .chain(backend.and_then(|found| missing_half(settings, found, unread.is_some())))
            .collect(),
        ..Context::default()
    };
    Ok(status(observed.as_ref(), context))
}

/// What is active where the configuration no longer names it: by a daemon, which keeps its places until it is
/// restarted; or by rules that the last one left, while nothing is at the new places.
pub(crate) struct Elsewhere {
    /// Where it is.
    pub settings: Settings,
    has_daemon: bool,
}

impl Elsewhere {
    /// Finds it by what was saved.
    pub(crate) fn find(settings: &Settings) -> Option<Self> {
        let its_own = state::settings(&settings.state_dir).ok()??;
        if its_own.is_at_same_place(settings) {
            return None;
        }
        let has_daemon = ask::is_served(&its_own.socket);
        let holds_rules = |settings: &Settings| ActiveRules::may_be_there(settings).unwrap_or(false);
        let left_its_rules = || !ask::is_served(&settings.socket) && holds_rules(&its_own) && !holds_rules(settings);
        (has_daemon || left_its_rules()).then_some(Self {
            settings: its_own,
            has_daemon,
        })
    }

    /// By the answer of a daemon: of what was saved nothing is found at another `state_dir`.
    pub(crate) fn of_daemon(settings: &Settings, status: &Status) -> Option<Self> {
        // Empty where it did not answer, or is of a version that does not tell.
        let told = |text: &str, ours: &Path| if text.is_empty() { ours.into() } else { text.into() };
        let its_own = Settings {
            pin_dir: told(&status.pin_dir, &settings.pin_dir),
            state_dir: told(&status.state_dir, &settings.state_dir),
            nft_table: status.nft_table.clone(),
            ..settings.clone()
        };
        (status.daemon.running && its_own != *settings).then_some(Self {
            settings: its_own,
            has_daemon: true,
        })
    }
}

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { settings, has_daemon } = self;
        write!(
            f,
            "the active rules are in {} or nftables table inet {}, and saved in {}",
            settings.pin_dir.display(),
            settings.nft_table,
            settings.state_dir.display()
        )?;
        if *has_daemon {
            write!(
                f,
                "; their daemon answers on {}: the configuration names other places, which count once the daemon \
                 is restarted",
                settings.socket.display()
            )
        } else {
            f.write_str(": the configuration names other places, which count from the next start or enforcer apply on")
        }
    }
}

/// That one of the two halves of `both` holds nothing.
fn missing_half(settings: &Settings, found: ActiveBackend, unread: bool) -> Option<Condition> {
    let asked = settings.backend == Backend::Both && !unread;
    let remedy = format!(
        "which backend = \"both\" asks for; {}, or run enforcer apply",
        host::START
    );
    match found {
        ActiveBackend::Ebpf if asked => Some(ConditionId::Table.because(format!(
            "nothing is active in nftables table inet {}, {remedy}",
            settings.nft_table
        ))),
        ActiveBackend::Nftables if asked => Some(ConditionId::Link.because(format!(
            "no eBPF program is active by {}, {remedy}",
            settings.pin_dir.display()
        ))),
        ActiveBackend::Ebpf | ActiveBackend::Nftables | ActiveBackend::Both | ActiveBackend::None => None,
    }
}

/// What was known of names when the last known good rules were saved, which are the active ones as a rule.
pub(crate) fn saved_names(settings: &Settings) -> Option<Vec<NameStatus>> {
    let (good, _) = state::load(&settings.state_dir).ok()??;
    let status = |name: Name| {
        let known = good.names.get(&name).map(KnownName::addresses).unwrap_or_default();
        let protects = protection(!known.is_empty(), good.policy.dns.unresolved);
        NameStatus {
            name: name.to_string(),
            addresses: known.iter().map(ToString::to_string).collect(),
            stale: known.is_empty(),
            cause: known
                .is_empty()
                .then(|| "it had no address when the rules were saved".to_owned()),
            protects,
            cut: 0,
        }
    };
    Some(good.policy.names().into_iter().map(status).collect())
}
