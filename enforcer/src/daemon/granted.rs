//! `enforcer grants`: who is granted what, by grants and by rules of jobs.

use crate::{
    grants::{Grantee, Key, MAX_GRANTS, Term},
    host::{self, Identities, NoMatch},
    inputs::Inputs,
    ruleset::Cgroup,
    wire::{GrantStatus, GrantsReport, JobRuleStatus, Schema, rfc3339},
};

/// All that is granted.
pub(crate) fn report(inputs: &Inputs, identities: &Identities) -> GrantsReport {
    let status = |(key, term): (&Key, &Term)| {
        let target = inputs.config.policy.target(&key.target);
        let found = key.to.cgroup().map(|cgroup| host::cgroup(&inputs.config.mount, cgroup));
        let user = key.to.user().map(|uid| uid.0);
        GrantStatus {
            target: key.target.clone(),
            user,
            user_name: identities.name_of(user),
            cgroup: key.to.cgroup().map(ToString::to_string),
            cgroup_exists: found.as_ref().map(|found| !matches!(found, Err(NoMatch::Missing))),
            cgroup_writable: found.as_ref().and_then(writable),
            active: target.is_some_and(|target| target.grants) && found != Some(Err(NoMatch::Unplaced)),
            since: rfc3339(term.since.into()),
            expires: term.expires.map(|end| rfc3339(end.into())),
            pid: term.by.pid,
            uid: term.by.uid,
            asker_name: identities.name_of(Some(term.by.uid)),
            comm: term.by.comm.clone(),
        }
    };
    GrantsReport {
        schema: Schema::Grants,
        limit: MAX_GRANTS,
        grants: inputs.grants.iter().map(status).collect(),
        job_rules: job_rules(inputs, identities),
    }
}

/// Of the rules of jobs.
fn job_rules(inputs: &Inputs, identities: &Identities) -> Vec<JobRuleStatus> {
    let status = |handle, grantee: Option<&Grantee>, ignored| {
        let user = grantee.and_then(Grantee::user).map(|uid| uid.0);
        JobRuleStatus {
            handle,
            user,
            user_name: identities.name_of(user),
            cgroup: grantee.and_then(Grantee::cgroup).map(ToString::to_string),
            ignored,
        }
    };
    let granted = inputs.granted();
    let effects = inputs.jobs.effects(&granted).into_iter();
    let all = effects.map(|(rule, effect)| match effect {
        Ok(grantee) => {
            let found = grantee
                .cgroup()
                .map(|cgroup| host::cgroup(&inputs.config.mount, cgroup));
            let ignored = found.as_ref().and_then(writable);
            status(rule.handle, Some(&grantee), ignored)
        }
        Err(why) => status(rule.handle, None, Some(why.to_string())),
    });
    all.collect()
}

/// What of a cgroup is not root's.
fn writable(found: &Result<Cgroup, NoMatch>) -> Option<String> {
    match found {
        Err(NoMatch::Writable(by)) => Some(by.to_string()),
        Ok(_) | Err(NoMatch::Missing | NoMatch::Unplaced) => None,
    }
}
