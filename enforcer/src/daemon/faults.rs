//! What is wrong now: logged once a change, and a cause in `status` until it is fixed (F4).

use std::collections::BTreeMap;

use tracing::{error, info};

use crate::wire::{Condition, ConditionId};

/// What something can be wrong with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    /// What is active is not what is wanted.
    RuleSet,
    /// The configuration as it is now was refused.
    Reload,
    /// The file of the last known good rule set.
    State,
    /// The BOSH agent's settings.
    Bus,
    /// What is local to this host.
    Host,
    /// The file of grants.
    Grants,
    /// The sweep of older connections.
    Sweep,
    /// Users that the configuration names.
    Users,
    /// Where denials come from.
    Denials,
    /// Having dials told.
    Dials,
    /// Reading the chain that rules of jobs are in.
    JobRules,
    /// Writing there what was granted.
    JobsChain,
    /// The control socket.
    Socket,
    /// What must outlive this process is hidden from the host.
    Visibility,
}

impl About {
    fn id(self) -> ConditionId {
        match self {
            Self::RuleSet => ConditionId::RulesNotApplied,
            Self::Reload => ConditionId::ConfigurationRejected,
            Self::State => ConditionId::SavedRules,
            Self::Bus => ConditionId::MessageBus,
            Self::Host => ConditionId::LocalAddresses,
            Self::Grants => ConditionId::Grants,
            Self::Sweep => ConditionId::ExistingConnections,
            Self::Users => ConditionId::UnknownUsers,
            Self::Denials => ConditionId::DenialsNotReported,
            Self::Dials => ConditionId::DialsNotFollowed,
            Self::JobRules => ConditionId::JobRules,
            Self::JobsChain => ConditionId::JobsChain,
            Self::Socket => ConditionId::ControlSocket,
            Self::Visibility => ConditionId::HiddenFromHost,
        }
    }
}

/// At most one fault about each.
#[derive(Debug, Default)]
pub(super) struct Faults(BTreeMap<About, String>);

impl Faults {
    /// What is wrong now about something, or that nothing is; logged if that is news.
    pub(super) fn set(&mut self, about: About, fault: Option<String>) {
        if self.of(about) == fault.as_deref() {
            return;
        }
        match (&fault, about) {
            (Some(fault), _) => error!("{fault}"),
            (None, About::RuleSet) => info!("the rules match the configuration again"),
            (None, About::Reload) => info!("the configuration was loaded without errors again"),
            (None, About::State) => info!("the active rules are saved for the next start again"),
            (None, About::Bus) => info!("the message bus's settings are read without errors"),
            (None, About::Grants) => info!("grants are saved again"),
            (None, About::Sweep) => info!("connections older than the rules can be swept again"),
            (None, About::Denials) => info!("denials are reported again"),
            (None, About::Socket) => info!("commands reach the daemon again"),
            (None, About::Dials) => info!("dials of unknown addresses trigger lookups again"),
            (None, About::Visibility) => info!("the host sees pins, state and socket again, and is covered"),
            (None, About::JobRules) => info!("rules of jobs are followed again"),
            (None, About::JobsChain) => info!("grants of monit are written to the BOSH agent's chain again"),
            (None, About::Users) => info!("all users and groups that the configuration names exist now"),
            (None, About::Host) => info!("changes of this host's addresses are followed again"),
        }
        self.set_silently(about, fault);
    }

    /// As `set`, where the caller has logged it.
    pub(super) fn set_silently(&mut self, about: About, fault: Option<String>) {
        match fault {
            Some(fault) => drop(self.0.insert(about, fault)),
            None => drop(self.0.remove(&about)),
        }
    }

    /// What is wrong about something.
    pub(super) fn of(&self, about: About) -> Option<&str> {
        self.0.get(&about).map(String::as_str)
    }

    /// All that is wrong.
    pub(super) fn all(&self) -> impl Iterator<Item = Condition> {
        self.0.iter().map(|(about, fault)| about.id().because(fault))
    }
}
