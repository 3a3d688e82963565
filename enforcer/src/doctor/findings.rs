//! Findings as they are made, what could not be looked at, and the report of both.

use std::fmt::Display;

use crate::{
    backend::probe::{Fact, Facts, Feature, Need, choose},
    wire::{
        ActiveBackend, Backend, Schema,
        doctor::{ChoiceReport, FeatureReport, Finding, HostReport, Report, Side, Unseen, Weight},
    },
};

/// Most items that a finding lists.
const MAX_ITEMS: usize = 16;

/// What could not be looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps(Vec<Unseen>);

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings(Vec<Finding>);

impl Gaps {
    /// What a look brought, or that it brought nothing and why.
    pub(super) fn saw<T, E: Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|why| self.add(what, why)).ok()
    }

    pub(super) fn add(&mut self, what: &str, why: impl Display) {
        self.0.push(Unseen {
            what: what.to_owned(),
            why: why.to_string(),
        });
    }
}

impl Findings {
    /// A finding of items, if there are any; as many are listed as a person reads.
    pub(super) fn each(
        &mut self,
        id: &'static str,
        weight: Weight,
        what: &str,
        items: impl IntoIterator<Item = String>,
        remedy: &str,
    ) {
        let mut items: Vec<String> = items.into_iter().collect();
        if items.is_empty() {
            return;
        }
        let more = items.len().saturating_sub(MAX_ITEMS);
        if more > 0 {
            items.truncate(MAX_ITEMS);
            items.push(format!("… and {more} more"));
        }
        self.add(id, weight, what, items, remedy);
    }

    /// A finding that needs no items.
    pub(super) fn one(&mut self, id: &'static str, weight: Weight, what: &str, remedy: &str) {
        self.add(id, weight, what, Vec::new(), remedy);
    }

    fn add(&mut self, id: &'static str, weight: Weight, what: &str, items: Vec<String>, remedy: &str) {
        self.0.push(Finding {
            id,
            weight,
            what: what.to_owned(),
            items,
            remedy: remedy.to_owned(),
        });
    }

    /// All of them, the worst first, with what else was seen.
    pub(super) fn report(mut self, host: HostReport, features: &Facts, wanted: Backend, gaps: Gaps) -> Report {
        let choice = choose(&features.works(), wanted);
        if choice.backend.is_none() {
            self.one(
                "no-backend",
                Weight::High,
                &choice.reason,
                "provide what is missing, or set `backend` to the other one; until then enforcer does not start and \
                 protects nothing",
            );
        }
        self.0.sort_by_key(|finding| (finding.weight, finding.id));
        Report {
            schema: Schema::Doctor,
            host,
            features: features.iter().map(feature).collect(),
            choice: ChoiceReport {
                wanted,
                backend: choice.backend,
                why: choice.reason,
            },
            findings: self.0,
            unseen: gaps.0,
        }
    }
}

fn feature((feature, fact): (Feature, &Fact)) -> FeatureReport {
    let about = feature.about();
    let why = fact.obstacle().map(|why| match about.need {
        Need::Must => why.to_owned(),
        Need::May(consequence) => format!("{why}; {consequence}"),
    });
    // As serde names it.
    let id = serde_json::to_value(feature).ok();
    FeatureReport {
        id: id.and_then(|id| id.as_str().map(str::to_owned)).unwrap_or_default(),
        title: about.title.to_owned(),
        of: about.side,
        required: about.need == Need::Must,
        state: fact.state(),
        why,
        since: about.since.to_owned(),
    }
}

/// What enforces here works without some feature.
pub(super) fn of_features(facts: &Facts, enforces: ActiveBackend, findings: &mut Findings) {
    let missing = facts.iter().filter_map(|(feature, fact)| {
        let about = feature.about();
        let asks = match about.side {
            Side::Ebpf => enforces.has_ebpf(),
            Side::Nftables => enforces.has_nftables(),
            Side::Either => true,
        };
        let (Need::May(consequence), Some(why), true) = (about.need, fact.obstacle(), asks) else {
            return None;
        };
        Some(format!("{} ({}): {why}; {consequence}", about.title, about.since))
    });
    findings.each(
        "feature-missing",
        Weight::Medium,
        "this kernel lacks optional features that enforcer uses",
        missing,
        "use a kernel that has them, or load the module",
    );
}
