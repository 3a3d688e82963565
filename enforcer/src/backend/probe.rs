//! What this kernel can do, found by trying, and the pure choice of a backend from it.
//!
//! The whole probe is for `enforcer doctor`: it loads the programs and takes a hundred milliseconds. A start knows the
//! two facts that it chooses by from what it does anyway ([`Usability`]).

use std::{fmt, path::Path};

use serde::Serialize;

use super::{BackendError, ebpf};
use crate::{
    config::Backend,
    host::sock_diag,
    policy::Protocol,
    wire::doctor::{FeatureState, Side},
};

mod bpf;
mod nft;

/// Something that is there or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    /// It was tried and works.
    Supported,
    /// The kernel does not have it, or not here.
    Missing {
        /// What the kernel said.
        why: String,
    },
    /// It could not be found out.
    Inconclusive(String),
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "`about` describes each")]
pub(crate) enum Feature {
    BpfSyscall,
    CgroupSockAddr,
    CgroupLink,
    RingBuffer,
    BatchOperations,
    Bpffs,
    Programs,
    Attach,
    SocketOwner,
    OtherOwners,
    NetnsCookie,
    NfTables,
    NftMaps,
    NftRanges,
    NftSocketUser,
    NftReject,
    NftCounter,
    NftLimit,
    NftForward,
    NftLog,
    NftSocketCgroup,
    SockDiag,
    SockDestroy,
    CapBpf,
    CapPerfmon,
    CapNetAdmin,
}

/// What becomes of a backend without a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// It does not work.
    Must,
    /// It works, and this is then so.
    May(&'static str),
}

/// A feature described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FeatureInfo {
    /// In a few words.
    pub title: &'static str,
    /// The first Linux that has it, by the kernel's own history, and the option that leaves it out.
    pub since: &'static str,
    /// Who asks for it.
    pub side: Side,
    /// How much.
    pub need: Need,
}

impl Feature {
    /// All, as they are shown.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 26] = [
        Self::BpfSyscall,
        Self::CgroupSockAddr,
        Self::CgroupLink,
        Self::RingBuffer,
        Self::BatchOperations,
        Self::Bpffs,
        Self::Programs,
        Self::Attach,
        Self::SocketOwner,
        Self::OtherOwners,
        Self::NetnsCookie,
        Self::NfTables,
        Self::NftMaps,
        Self::NftRanges,
        Self::NftSocketUser,
        Self::NftReject,
        Self::NftCounter,
        Self::NftLimit,
        Self::NftForward,
        Self::NftLog,
        Self::NftSocketCgroup,
        Self::SockDiag,
        Self::SockDestroy,
        Self::CapBpf,
        Self::CapPerfmon,
        Self::CapNetAdmin,
    ];

    /// What it is, and who needs it.
    #[must_use]
    pub(crate) const fn about(self) -> FeatureInfo {
        use Need::{May, Must};
        use Side::{Ebpf, Either, Nftables};
        let (title, since, side, need) = match self {
            Self::BpfSyscall => ("bpf(2)", "CONFIG_BPF_SYSCALL", Ebpf, Must),
            Self::CgroupSockAddr => ("programs at connect", "Linux 4.17, CONFIG_CGROUP_BPF", Ebpf, Must),
            Self::CgroupLink => ("links to cgroups", "Linux 5.7", Ebpf, Must),
            Self::RingBuffer => ("ring buffer", "Linux 5.8", Ebpf, Must),
            Self::BatchOperations => ("map operations in batches", "Linux 5.6", Ebpf, Must),
            Self::Bpffs => ("a bpffs for pins", "Linux 4.4, mount -t bpf", Ebpf, Must),
            Self::Programs => ("enforcer's own programs load", "Linux 5.8", Ebpf, Must),
            Self::Attach => ("they attach to the cgroup", "Linux 5.7", Ebpf, Must),
            Self::SocketOwner => (
                "BTF with the socket's owner",
                "Linux 5.4, CONFIG_DEBUG_INFO_BTF",
                Ebpf,
                May("only the task's user is checked"),
            ),
            Self::OtherOwners => (
                "owners of sockets other than TCP's",
                "Linux 6.2, or no lockdown=confidentiality",
                Ebpf,
                May("for UDP and MPTCP sockets only the task's user is checked"),
            ),
            Self::NetnsCookie => (
                "cookie of the network namespace",
                "Linux 5.14",
                Ebpf,
                May("loopback is evaluated in every network namespace"),
            ),
            Self::NfTables => (
                "nf_tables, family inet",
                "Linux 3.14, CONFIG_NF_TABLES_INET",
                Nftables,
                Must,
            ),
            Self::NftMaps => ("nft verdict maps of protocol and port", "Linux 4.1", Nftables, Must),
            Self::NftRanges => ("nft ranges of addresses in sets", "Linux 3.13", Nftables, Must),
            Self::NftSocketUser => ("nft meta skuid", "Linux 3.14", Nftables, Must),
            Self::NftReject => ("nft reject", "Linux 3.18, CONFIG_NFT_REJECT_INET", Nftables, Must),
            Self::NftCounter => ("nft named counters", "Linux 4.10", Nftables, Must),
            Self::NftLimit => ("nft limit", "Linux 3.14, CONFIG_NFT_LIMIT", Nftables, Must),
            Self::NftForward => ("nft hooks prerouting and forward", "Linux 3.14", Nftables, Must),
            Self::NftLog => (
                "nft log to nflog",
                "CONFIG_NFT_LOG, CONFIG_NETFILTER_NETLINK_LOG",
                Nftables,
                May("nftables denials are counted but not reported individually"),
            ),
            Self::NftSocketCgroup => (
                "nft socket cgroupv2",
                "Linux 5.13, CONFIG_NFT_SOCKET",
                Nftables,
                May("with nftables, principals with a cgroup match nobody"),
            ),
            Self::SockDiag => (
                "sockets listed by sock_diag",
                "CONFIG_INET_DIAG",
                Either,
                May("connections older than the rules are not found"),
            ),
            Self::SockDestroy => (
                "sockets destroyed by sock_diag",
                "Linux 4.5, CONFIG_INET_DIAG_DESTROY",
                Either,
                May("existing = \"cut\" terminates nothing"),
            ),
            Self::CapBpf => ("CAP_BPF or CAP_SYS_ADMIN", "run as root", Ebpf, Must),
            Self::CapPerfmon => ("CAP_PERFMON or CAP_SYS_ADMIN", "run as root", Ebpf, Must),
            Self::CapNetAdmin => ("CAP_NET_ADMIN", "run as root", Either, Must),
        };
        FeatureInfo {
            title,
            since,
            side,
            need,
        }
    }
}

/// Where to try.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrialSite<'a> {
    /// The cgroup to attach to; none where there is no cgroup v2.
    pub cgroup: Option<&'a Path>,
    /// The pin directory as configured.
    pub pin_dir: &'a Path,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts(Vec<(Feature, Fact)>);

/// Tries everything. Leaves nothing behind, and judges nothing meanwhile.
pub(crate) async fn probe(place: TrialSite<'_>) -> Facts {
    let mut facts = Facts::default();
    bpf::probe(place, &mut facts);
    nft::probe(&mut facts);
    let listed = sock_diag::listeners(Protocol::Tcp, false, |_| {}).await;
    facts.set(Feature::SockDiag, Fact::from_errno(listed));
    let destroyed = sock_diag::try_to_destroy().await;
    facts.set(Feature::SockDestroy, Fact::from_errno(destroyed));
    capabilities(&mut facts);
    facts.0.sort_by_key(|(feature, _)| *feature);
    facts
}

impl Facts {
    /// Adds a fact, in place of an earlier one of the same feature.
    pub(crate) fn set(&mut self, feature: Feature, fact: Fact) {
        self.0.retain(|(known, _)| *known != feature);
        self.0.push((feature, fact));
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Feature, &Fact)> {
        self.0.iter().map(|(feature, fact)| (*feature, fact))
    }

    /// Whether each backend works: all that it must have does. Pure.
    #[must_use]
    pub(crate) fn works(&self) -> Usability {
        let of = |side: Side| {
            let mut worst = Fact::Supported;
            for (feature, fact) in self.iter() {
                let about = feature.about();
                if about.need != Need::Must || !(about.side == side || about.side == Side::Either) {
                    continue;
                }
                let named = |why: &str| format!("{}: {why} ({})", about.title, about.since);
                match (&worst, fact) {
                    (Fact::Supported | Fact::Inconclusive(_), Fact::Missing { why }) => {
                        worst = Fact::Missing { why: named(why) };
                    }
                    (Fact::Supported, Fact::Inconclusive(why)) => worst = Fact::Inconclusive(named(why)),
                    (_, Fact::Supported)
                    | (Fact::Missing { .. }, Fact::Missing { .. } | Fact::Inconclusive(_))
                    | (Fact::Inconclusive(_), Fact::Inconclusive(_)) => {}
                }
            }
            worst
        };
        Usability {
            ebpf: of(Side::Ebpf),
            nftables: of(Side::Nftables),
        }
    }
}

/// Whether each backend works here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Usability {
    /// eBPF.
    pub ebpf: Fact,
    /// nftables; it matters only where eBPF does not work, or both are wanted.
    pub nftables: Fact,
}

/// What a choice comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// What would enforce; none where nothing can.
    pub backend: Option<Backend>,
    /// Why, or what is missing.
    pub reason: String,
}

/// Chooses a backend (§5), for a start and for `doctor`: `auto` takes ebpf, else nftables, else nothing. Only what this
/// kernel lacks is a reason to fall back: a mistake of the configuration, or what could not be found out, is repaired,
/// not evaded. What is asked for by name is not replaced. Pure.
#[must_use]
pub(crate) fn choose(works: &Usability, wanted: Backend) -> Choice {
    let chosen = |backend, reason: String| Choice {
        backend: Some(backend),
        reason,
    };
    let refused = |reason| Choice { backend: None, reason };
    let (ebpf, nftables) = (&works.ebpf, &works.nftables);
    if let (Backend::Auto, Fact::Inconclusive(why)) = (wanted, ebpf) {
        return refused(format!(
            "auto does not fall back to nftables, as the kernel is not the reason that ebpf does not work: {why}; fix \
             that, or set a backend"
        ));
    }
    match (wanted, ebpf.obstacle(), nftables.obstacle()) {
        (Backend::Auto, None, _) => chosen(Backend::Ebpf, "auto chose ebpf, which works here".to_owned()),
        (Backend::Auto, Some(ebpf), None) => chosen(
            Backend::Nftables,
            format!("auto chose nftables, as ebpf does not work here: {ebpf}"),
        ),
        (Backend::Auto, Some(ebpf), Some(nftables)) => {
            refused(format!("no backend works here; ebpf: {ebpf}; nftables: {nftables}"))
        }
        (Backend::Ebpf, None, _) => chosen(Backend::Ebpf, "ebpf is configured and works here".to_owned()),
        (Backend::Ebpf, Some(why), _) => refused(format!("ebpf is configured but does not work here: {why}")),
        (Backend::Nftables, _, None) => chosen(Backend::Nftables, "nftables is configured and works here".to_owned()),
        (Backend::Nftables, _, Some(why)) => refused(format!("nftables is configured but does not work here: {why}")),
        (Backend::Both, None, None) => chosen(Backend::Both, "both are configured and work here".to_owned()),
        (Backend::Both, ebpf, nftables) => {
            let missing: Vec<String> = [("ebpf", ebpf), ("nftables", nftables)]
                .into_iter()
                .filter_map(|(name, why)| Some(format!("{name}: {}", why?)))
                .collect();
            refused(format!(
                "both are configured but do not work here; {}",
                missing.join("; ")
            ))
        }
    }
}

impl Fact {
    /// By an attempt: what the kernel does not know is missing, any other failure tells nothing.
    pub(crate) fn from_errno(result: Result<(), std::io::Error>) -> Self {
        match result {
            Ok(()) => Self::Supported,
            Err(error) => match error.raw_os_error() {
                Some(
                    libc::ENOSYS
                    | libc::EOPNOTSUPP
                    | libc::EINVAL
                    | libc::ENOENT
                    | libc::EPROTONOSUPPORT
                    | libc::ENOPROTOOPT
                    | libc::ENODEV
                    | libc::EAFNOSUPPORT,
                ) => Self::Missing { why: error.to_string() },
                Some(_) | None => Self::Inconclusive(error.to_string()),
            },
        }
    }

    /// By what a start met: what the kernel cannot do is missing, any other failure is somebody's to repair.
    pub(crate) fn from_backend(error: &BackendError) -> Self {
        let why = error.cause();
        if error.is_inability(ebpf::has_bpf) {
            Self::Missing { why }
        } else {
            Self::Inconclusive(why)
        }
    }

    /// Why it does not work, if it does not.
    #[must_use]
    pub(crate) fn obstacle(&self) -> Option<&str> {
        match self {
            Self::Supported => None,
            Self::Missing { why } | Self::Inconclusive(why) => Some(why),
        }
    }

    /// Without its reason.
    #[must_use]
    pub(crate) const fn state(&self) -> FeatureState {
        match self {
            Self::Supported => FeatureState::Supported,
            Self::Missing { .. } => FeatureState::Missing,
            Self::Inconclusive(_) => FeatureState::Inconclusive,
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.about().title)
    }
}

fn capabilities(facts: &mut Facts) {
    use caps::{CapSet, Capability};
    let held = caps::read(None, CapSet::Effective);
    let fact = |any: &[Capability]| match &held {
        Ok(held) if any.iter().any(|capability| held.contains(capability)) => Fact::Supported,
        Ok(_) => Fact::Missing {
            why: "not held".to_owned(),
        },
        Err(error) => Fact::Inconclusive(error.to_string()),
    };
    let admin = Capability::CAP_SYS_ADMIN;
    facts.set(Feature::CapBpf, fact(&[Capability::CAP_BPF, admin]));
    facts.set(Feature::CapPerfmon, fact(&[Capability::CAP_PERFMON, admin]));
    facts.set(Feature::CapNetAdmin, fact(&[Capability::CAP_NET_ADMIN]));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(why: &str) -> Fact {
        Fact::Missing { why: why.to_owned() }
    }

    fn works(ebpf: &Fact, nftables: &Fact) -> Usability {
        Usability {
            ebpf: ebpf.clone(),
            nftables: nftables.clone(),
        }
    }

    #[test]
    fn auto_takes_the_first_that_works_and_names_are_kept_to() {
        use Backend::{Auto, Both, Ebpf, Nftables};
        let (yes, no) = (Fact::Supported, missing("no such thing"));
        let unknown = Fact::Inconclusive("who knows".to_owned());
        for (wanted, ebpf, nftables, chosen) in [
            (Auto, &yes, &yes, Some(Ebpf)),
            (Auto, &yes, &no, Some(Ebpf)),
            (Auto, &no, &yes, Some(Nftables)),
            // As a start does: only what is missing for sure is fallen back from.
            (Auto, &unknown, &yes, None),
            (Auto, &no, &no, None),
            (Auto, &no, &unknown, None),
            (Ebpf, &yes, &no, Some(Ebpf)),
            (Ebpf, &no, &yes, None),
            (Nftables, &yes, &no, None),
            (Nftables, &no, &yes, Some(Nftables)),
            (Both, &yes, &yes, Some(Both)),
            (Both, &yes, &no, None),
            (Both, &no, &yes, None),
        ] {
            let choice = choose(&works(ebpf, nftables), wanted);
            assert_eq!(choice.backend, chosen, "{wanted} {ebpf:?} {nftables:?}: {choice:?}");
            // What stands in the way is named, always.
            let obstacles = [ebpf, nftables].map(|fact| fact.obstacle().unwrap_or_default());
            if choice.backend.is_none() {
                assert!(
                    obstacles
                        .iter()
                        .any(|why| !why.is_empty() && choice.reason.contains(why)),
                    "{choice:?}"
                );
            }
        }
    }

    #[test]
    fn a_backend_works_if_it_has_all_that_it_must_have() {
        let mut all = Facts::default();
        for feature in Feature::ALL {
            all.set(feature, Fact::Supported);
        }
        assert_eq!(all.works(), works(&Fact::Supported, &Fact::Supported));
        for feature in Feature::ALL {
            let mut facts = all.clone();
            facts.set(feature, missing("gone"));
            let FeatureInfo { side, need, title, .. } = feature.about();
            let works = facts.works();
            for (fact, of) in [(works.ebpf, Side::Ebpf), (works.nftables, Side::Nftables)] {
                let concerned = need == Need::Must && (side == of || side == Side::Either);
                assert_eq!(fact != Fact::Supported, concerned, "{feature:?}: {fact:?}");
                assert!(!concerned || fact.obstacle().is_some_and(|why| why.contains(title)));
            }
        }
        // What is missing for sure is said before what is not known.
        let mut facts = all;
        facts.set(Feature::BpfSyscall, Fact::Inconclusive("hm".to_owned()));
        facts.set(Feature::RingBuffer, missing("gone"));
        assert!(matches!(facts.works().ebpf, Fact::Missing { .. }));
    }

    #[test]
    fn every_feature_is_listed_once() {
        let mut all = Feature::ALL.to_vec();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), Feature::ALL.len());
        assert_eq!(all, Feature::ALL);
    }
}
