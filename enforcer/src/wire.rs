//! The shapes of everything that is printed or sent, and the words in them. It knows nothing of the rest: the module
//! that reports something fills in its shape here.
//!
//! A version of a schema only ever gains keys, and no word changes (`schemas.md`); requests are the client's.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// Defines an enumeration of which each variant is a word: the same one in JSON and in text.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$of])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// All there are.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self {
                    $(Self::$variant => $word,)+
                })
            }
        }
    };
}
pub(crate) use words;

pub mod check;
mod conditions;
pub mod doctor;
mod events;
mod grants;
mod reload;
mod status;
mod summary;
#[cfg(test)]
mod tests;
mod verification;

pub use conditions::{Condition, ConditionId, Severity};
pub use enforcer_client::wire::{EventFilter, GrantRequest, Request, RevokeRequest, Selector, State};
pub use events::{Denial, Event, ExistingAction, ExistingEvent, GrantAction, GrantEvent, Lost, SocketState};
pub use grants::{GrantStatus, GrantsReport, JobRuleStatus};
pub use reload::{GrantChange, ReloadReport, SettingChange, UnprotectedEndpoint};
pub use status::{
    DaemonStatus, DialStatus, ExistingStatus, NameProtection, NameStatus, PrincipalStatus, Status, SubjectKind,
    TargetStatus,
};
pub use summary::{DenialSum, SumOf};
pub use verification::{Against, Difference, DifferenceKind, Object, Verification};

words! {
    /// Kind and version of an object.
    #[allow(missing_docs, reason = "each is the schema that it says")]
    Schema {
        Check = "enforcer/check/1",
        Config = "enforcer/config/1",
        ConfigCheck = "enforcer/config-check/1",
        Doctor = "enforcer/doctor/1",
        Event = "enforcer/event/1",
        Existing = "enforcer/existing/1",
        Grant = "enforcer/grant/1",
        Grants = "enforcer/grants/1",
        Lost = "enforcer/lost/1",
        Reload = "enforcer/reload/1",
        Status = "enforcer/status/1",
        Summary = "enforcer/summary/1",
        Verify = "enforcer/verify/1",
    }
}

words! {
    /// What becomes of an attempt.
    Verdict {
        /// Every target that contains the destination allows it, or no target does.
        Allow = "allow",
        /// It is denied.
        Deny = "deny",
        /// It would be denied, were it not for audit mode.
        WouldDeny = "would-deny",
    }
}

words! {
    /// What is to enforce.
    Backend {
        /// What a probe finds.
        Auto = "auto",
        /// eBPF at `connect`, or nothing.
        Ebpf = "ebpf",
        /// nftables where packets leave, are forwarded and arrive, or nothing.
        Nftables = "nftables",
        /// Both together, or nothing.
        Both = "both",
    }
}

words! {
    /// What enforces.
    #[derive(Default)]
    ActiveBackend {
        /// eBPF alone.
        Ebpf = "ebpf",
        /// nftables alone.
        Nftables = "nftables",
        /// Both together.
        Both = "both",
        /// Nothing is active.
        #[default]
        None = "none",
    }
}

words! {
    /// A transport protocol that can be evaluated.
    Protocol {
        /// TCP, whatever opens it: MPTCP and fast open too.
        Tcp = "tcp",
        /// UDP, at `connect` and at `sendmsg`.
        Udp = "udp",
    }
}

words! {
    /// What a verdict against an attempt does.
    #[derive(Default)]
    Mode {
        /// Refuse what is denied.
        #[default]
        Enforce = "enforce",
        /// Evaluate, count and report; deny nothing.
        Audit = "audit",
    }
}

words! {
    /// What becomes of connections that are older than the rules that would deny them (D9).
    Existing {
        /// They are reported, and stay.
        Report = "report",
        /// They are reported and destroyed.
        Cut = "cut",
    }
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(clippy::large_enum_variant, reason = "most replies are events")]
pub enum Reply {
    /// To `status` and `refresh`.
    Status(Box<Status>),
    /// To `events`.
    Event(Event),
    /// To `summary`.
    Sum(Box<DenialSum>),
    /// To `grant`.
    Grant(Box<GrantEvent>),
    /// To `revoke`.
    Revoked(Vec<GrantEvent>),
    /// To `grants`.
    Grants(GrantsReport),
    /// To `verify`.
    Verification(Box<Verification>),
    /// To `reload`.
    Reload(Box<ReloadReport>),
    /// To `unload`.
    Done,
    /// It could not be done.
    Error(String),
}

/// A time as events and status give it.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.6}"))
}

impl ActiveBackend {
    /// By which of the two are in use.
    pub(crate) fn of(ebpf: bool, nftables: bool) -> Self {
        match (ebpf, nftables) {
            (true, true) => Self::Both,
            (false, true) => Self::Nftables,
            (true, false) => Self::Ebpf,
            (false, false) => Self::None,
        }
    }

    pub(crate) fn has_ebpf(self) -> bool {
        matches!(self, Self::Ebpf | Self::Both)
    }

    pub(crate) fn has_nftables(self) -> bool {
        matches!(self, Self::Nftables | Self::Both)
    }
}

impl From<enforcer_ebpf::Verdict> for Verdict {
    fn from(verdict: enforcer_ebpf::Verdict) -> Self {
        match verdict {
            enforcer_ebpf::Verdict::Unjudged | enforcer_ebpf::Verdict::Allow => Self::Allow,
            enforcer_ebpf::Verdict::Deny => Self::Deny,
            enforcer_ebpf::Verdict::WouldDeny => Self::WouldDeny,
        }
    }
}
