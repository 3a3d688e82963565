//! What is not as asked for, each kind with an id that never changes and a weight.

use serde::{Deserialize, Serialize};

/// Something that is not as asked for, or that an operator should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Its kind.
    pub id: ConditionId,
    /// How much it matters.
    pub severity: Severity,
    /// What is so, what comes of it, and what to do: for people, and free to change.
    pub text: String,
}

words! {
    /// How much a condition matters.
    Severity {
        /// All is as asked for; worth knowing.
        Info = "info",
        /// The rules are active, but something they rest on fails.
        Warning = "warning",
        /// Something that is to be protected is not, or may soon not be.
        Critical = "critical",
    }
}

words! {
    /// Kinds of conditions.
    ConditionId {
        /// `auto` uses nftables.
        BackendFallback = "backend-fallback",
        /// The message bus's servers are not known, or its settings cannot be read.
        MessageBus = "message-bus",
        /// A cgroup that principals name does not exist, or its place is not known.
        CgroupMissing = "cgroup-missing",
        /// A cgroup that principals name is not root's alone.
        CgroupWritable = "cgroup-writable",
        /// This kernel's nftables cannot match cgroups.
        CgroupsIgnored = "cgroups-ignored",
        /// Another process removed or changed rules within the last seconds.
        ChangedByOthers = "changed-by-others",
        /// The configuration file was rejected.
        ConfigurationRejected = "configuration-rejected",
        /// Commands do not reach the daemon: its socket is gone and cannot be made again.
        ControlSocket = "control-socket",
        /// The daemon is there, and did not answer in time: what it alone knows is missing here.
        DaemonNotAnswering = "daemon-not-answering",
        /// No daemon answers.
        DaemonNotRunning = "daemon-not-running",
        /// Denials are counted and not reported one by one.
        DenialsNotReported = "denials-not-reported",
        /// Dials of unknown addresses do not trigger lookups.
        DialsNotFollowed = "dials-not-followed",
        /// Connections older than the rules cannot be swept.
        ExistingConnections = "existing-connections",
        /// The file of grants is damaged or cannot be written.
        Grants = "grants",
        /// Pins, state or socket are not where the host sees them.
        HiddenFromHost = "hidden-from-host",
        /// Rules of BOSH jobs cannot be read.
        JobRules = "job-rules",
        /// Grants cannot be written to the BOSH agent's chain.
        JobsChain = "jobs-chain",
        /// An eBPF link is detached or runs something else.
        Link = "link",
        /// This host's addresses are not followed.
        LocalAddresses = "local-addresses",
        /// The last lookup of a name failed; its last addresses stay protected.
        NameStale = "name-stale",
        /// A name has more addresses than are protected.
        NameTruncated = "name-truncated",
        /// A name has never resolved.
        NameUnresolved = "name-unresolved",
        /// No rules are active.
        NothingActive = "nothing-active",
        /// The desired rules could not be made active.
        RulesNotApplied = "rules-not-applied",
        /// The active rules cannot be saved for the next start, or the saved ones are damaged.
        SavedRules = "saved-rules",
        /// The nftables table is changed, dormant or missing.
        Table = "table",
        /// A user or group that the configuration names does not exist.
        UnknownUsers = "unknown-users",
        /// What is active cannot be read.
        Unreadable = "unreadable",
    }
}

impl ConditionId {
    /// How much it matters, as a rule.
    fn severity(self) -> Severity {
        match self {
            Self::BackendFallback => Severity::Info,
            Self::MessageBus
            | Self::CgroupMissing
            | Self::CgroupWritable
            | Self::CgroupsIgnored
            | Self::ConfigurationRejected
            | Self::ControlSocket
            | Self::DaemonNotAnswering
            | Self::DaemonNotRunning
            | Self::DenialsNotReported
            | Self::DialsNotFollowed
            | Self::ExistingConnections
            | Self::Grants
            | Self::JobRules
            | Self::JobsChain
            | Self::LocalAddresses
            | Self::NameStale
            | Self::SavedRules
            | Self::UnknownUsers => Severity::Warning,
            Self::ChangedByOthers
            | Self::HiddenFromHost
            | Self::Link
            | Self::NameTruncated
            | Self::NameUnresolved
            | Self::NothingActive
            | Self::RulesNotApplied
            | Self::Table
            | Self::Unreadable => Severity::Critical,
        }
    }

    /// A condition of this kind.
    pub(crate) fn because(self, text: impl Into<String>) -> Condition {
        Condition {
            id: self,
            severity: self.severity(),
            text: text.into(),
        }
    }
}

impl Condition {
    /// The same, mattering otherwise.
    pub(crate) fn with(self, severity: Severity) -> Self {
        Self { severity, ..self }
    }
}
