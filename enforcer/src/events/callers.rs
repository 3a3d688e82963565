//! Whose denials are counted together, and what is told apart of each: a budget of their own, so that nobody crowds
//! another out. Pure.

use std::collections::{BTreeMap, btree_map::Entry};

use serde::{Deserialize, Serialize};

use crate::wire::Denial;

/// Users told apart at once, and of those with a UID from [`MAPPED`] on.
pub(crate) const USERS: usize = 128;
pub(crate) const MAPPED_USERS: usize = 32;
/// Whoever holds a range of subordinate UIDs (man 5 subuid) may call as tens of thousands of users; they have a budget
/// of their own.
const MAPPED: u32 = 1 << 16;

/// Whose budget a denial is counted on: that of the user who connects, or with nftables of the one who made the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Caller {
    User(u32),
    KernelThread,
    /// Forwarded, or a socket of the kernel's.
    Nobody,
}

impl Caller {
    pub(crate) fn of(event: &Denial) -> Self {
        if event.kernel_thread {
            return Self::KernelThread;
        }
        Self::of_socket(event.task_uid.or(event.socket_uid))
    }

    /// The owner of a socket; none is the kernel.
    pub(crate) fn of_socket(owner: Option<u32>) -> Self {
        owner.map_or(Self::Nobody, Self::User)
    }

    /// Whether it may be one of many that are all the same user.
    pub(crate) fn is_mapped(self) -> bool {
        matches!(self, Self::User(MAPPED..))
    }
}

/// The owner of a denial's socket, where that is another user than the task's.
pub(crate) fn other_owner(event: &Denial) -> Option<u32> {
    let other = |owner: &u32| !event.kernel_thread && event.task_uid.is_some_and(|uid| uid != *owner);
    event.socket_uid.filter(other)
}

/// Kinds of denials, so many of each caller, with what is known of each; `B` is what is known of those beyond.
#[derive(Debug)]
pub(crate) struct Budgets<K, V, B> {
    kinds: usize,
    pub callers: BTreeMap<Caller, Budget<K, V, B>>,
    /// Of callers beyond the limit.
    pub beyond: Option<B>,
}

/// One caller's.
#[derive(Debug)]
pub(crate) struct Budget<K, V, B> {
    pub kinds: BTreeMap<K, V>,
    /// Of kinds beyond the limit.
    pub beyond: Option<B>,
}

impl<K, V, B> Budget<K, V, B> {
    fn new() -> Self {
        Self {
            kinds: BTreeMap::new(),
            beyond: None,
        }
    }
}

/// Where a denial is counted.
pub(crate) enum Place<'b, V, B> {
    /// With others of its kind.
    Kind(&'b mut V),
    /// With those that are not told apart.
    Beyond(&'b mut Option<B>),
}

impl<K: Ord, V, B> Budgets<K, V, B> {
    pub(crate) fn new(kinds: usize) -> Self {
        Self {
            kinds,
            callers: BTreeMap::new(),
            beyond: None,
        }
    }

    /// Where a denial of a kind is counted; `new` is what is known of a kind that was not known.
    pub(crate) fn place(&mut self, caller: Caller, kind: K, new: impl FnOnce() -> V) -> Place<'_, V, B> {
        if !self.callers.contains_key(&caller) && !self.has_room(caller) {
            return Place::Beyond(&mut self.beyond);
        }
        let limit = self.kinds;
        let Budget { kinds, beyond } = self.of(caller);
        let is_full = kinds.len() >= limit;
        match kinds.entry(kind) {
            Entry::Occupied(known) => Place::Kind(known.into_mut()),
            Entry::Vacant(_) if is_full => Place::Beyond(beyond),
            Entry::Vacant(free) => Place::Kind(free.insert(new())),
        }
    }

    /// One caller's, whatever it has.
    pub(crate) fn of(&mut self, caller: Caller) -> &mut Budget<K, V, B> {
        self.callers.entry(caller).or_insert_with(Budget::new)
    }

    /// Whether another kind of this caller's would be one too many.
    pub(crate) fn is_full(&self, caller: Caller) -> bool {
        let known = self.callers.get(&caller);
        known.is_some_and(|budget| budget.kinds.len() >= self.kinds)
    }

    pub(crate) fn has_room(&self, caller: Caller) -> bool {
        let limit = if caller.is_mapped() { MAPPED_USERS } else { USERS };
        let like = |other: &&Caller| other.is_mapped() == caller.is_mapped();
        self.callers.keys().filter(like).count() < limit
    }
}
