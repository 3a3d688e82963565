//! Targets that share an endpoint and allow nobody in common: a connection there needs both, so nobody may connect.
//! Found by what is written, not by what names and `local` mean at the moment.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::policy::{CgroupPath, Destination, Endpoint, Principal, Target};

/// What is local on every host.
const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1/128"];
/// Most comparisons for each pair of targets, of principals and of prefixes with other endpoints: what is beyond is not
/// looked at.
const MOST: usize = 1 << 20;

/// The first endpoint that two targets share though nobody is allowed by both.
pub(super) fn contradiction(one: &Target, other: &Target) -> Option<Endpoint> {
    // Whom a grant may add is not known here, and who is allowed by the file is not among them.
    if one.principals.is_empty() || other.principals.is_empty() {
        return None;
    }
    if one.principals.len().saturating_mul(other.principals.len()) > MOST {
        return None;
    }
    let endpoint = shared(one, other)?;
    let passes_both = |one: &Principal| other.principals.iter().any(|other| is_met_by_both(one, other));
    (!one.principals.iter().any(passes_both)).then_some(endpoint)
}

/// Whether some task can be both.
fn is_met_by_both(one: &Principal, other: &Principal) -> bool {
    match (one, other) {
        (Principal::Kernel, Principal::Kernel) => true,
        (
            Principal::User { uid, cgroup },
            Principal::User {
                uid: other,
                cgroup: place,
            },
        ) => uid == other && are_nested(cgroup.as_ref(), place.as_ref()),
        (Principal::Anybody { cgroup }, Principal::User { cgroup: place, .. })
        | (Principal::User { cgroup: place, .. }, Principal::Anybody { cgroup }) => {
            are_nested(Some(cgroup), place.as_ref())
        }
        (Principal::Anybody { cgroup }, Principal::Anybody { cgroup: other }) => are_nested(Some(cgroup), Some(other)),
        (Principal::Kernel, _) | (_, Principal::Kernel) => false,
    }
}

fn are_nested(one: Option<&CgroupPath>, other: Option<&CgroupPath>) -> bool {
    let (Some(one), Some(other)) = (one, other) else {
        return true;
    };
    let within = |inner: &str, outer: &str| {
        inner
            .strip_prefix(outer.trim_end_matches('/'))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    within(one.as_str(), other.as_str()) || within(other.as_str(), one.as_str())
}

/// An endpoint of one that the other has too, or the smaller of two of which one contains the other.
fn shared(one: &Target, other: &Target) -> Option<Endpoint> {
    if let Some(same) = one.endpoints.intersection(&other.endpoints).next() {
        return Some(same.clone());
    }
    contained(&one.endpoints, &other.endpoints).or_else(|| contained(&other.endpoints, &one.endpoints))
}

/// One of these that lies in a prefix of those.
fn contained(these: &BTreeSet<Endpoint>, those: &BTreeSet<Endpoint>) -> Option<Endpoint> {
    let mut prefixes: BTreeMap<_, Vec<IpNet>> = BTreeMap::new();
    for endpoint in those {
        let nets = match endpoint.destination {
            Destination::Prefix(net) => vec![net],
            // Loopback always (D7).
            Destination::Local => LOOPBACK.into_iter().filter_map(|net| net.parse().ok()).collect(),
            Destination::Address(_) | Destination::Name(_) => continue,
        };
        prefixes
            .entry((endpoint.protocol, endpoint.port))
            .or_default()
            .extend(nets);
    }
    let mut left = MOST;
    these
        .iter()
        .find(|endpoint| {
            let around = prefixes
                .get(&(endpoint.protocol, endpoint.port))
                .map_or(&[][..], Vec::as_slice);
            left = left.saturating_sub(around.len());
            let net = match endpoint.destination {
                Destination::Address(address) => IpNet::from(address),
                Destination::Prefix(net) => net,
                Destination::Local | Destination::Name(_) => return false,
            };
            left > 0 && around.iter().any(|around| around.contains(&net))
        })
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{AcceptedAnswers, Uid};

    type Test = Result<(), Box<dyn std::error::Error>>;

    fn target(endpoints: &[&str], principals: impl IntoIterator<Item = Principal>) -> Result<Target, String> {
        let parsed = endpoints
            .iter()
            .map(|text| Endpoint::parse(text).map_err(|error| error.to_string()));
        Ok(Target {
            name: "t".to_owned(),
            endpoints: parsed.collect::<Result<_, _>>()?,
            principals: principals.into_iter().collect(),
            grants: false,
            answers: AcceptedAnswers::Routable,
        })
    }

    fn user(uid: u32, cgroup: Option<&str>) -> Principal {
        let cgroup = cgroup.map(|path| CgroupPath(path.to_owned()));
        Principal::User { uid: Uid(uid), cgroup }
    }

    #[test]
    fn targets_that_share_an_endpoint_and_nobody_contradict_each_other() -> Test {
        let wide = target(&["10.99.0.0/24:6443"], [user(0, None)])?;
        for (endpoint, shared) in [
            ("10.99.0.2:6443", true),
            ("10.99.0.0/28:6443", true),
            ("10.0.0.0/8:6443", true),
            ("10.99.0.0/24:6443", true),
            ("udp://10.99.0.2:6443", false),
            ("10.99.0.2:443", false),
            ("10.98.0.2:6443", false),
            ("local:6443", false),
            ("127.0.0.7:6443", false),
        ] {
            let other = target(&["192.0.2.1:1", endpoint], [user(1, None)])?;
            assert_eq!(contradiction(&wide, &other).is_some(), shared, "{endpoint}");
            assert_eq!(contradiction(&other, &wide).is_some(), shared, "{endpoint}");
        }
        Ok(())
    }

    #[test]
    fn local_is_loopback_too() -> Test {
        let local = target(&["local:2822"], [user(1, None)])?;
        for (endpoint, shared) in [("127.0.0.1:2822", true), ("[::1]:2822", true), ("10.0.0.1:2822", false)] {
            let other = target(&[endpoint], [user(0, None)])?;
            assert_eq!(contradiction(&local, &other).is_some(), shared, "{endpoint}");
        }
        Ok(())
    }

    #[test]
    fn whoever_passes_both_ends_the_contradiction() -> Test {
        let allows = |principal| target(&["10.0.0.1:1"], [user(7, None), principal]);
        let anybody = |path: &str| Principal::Anybody {
            cgroup: CgroupPath(path.to_owned()),
        };
        for (one, other, clash) in [
            (user(1, None), user(1, None), false),
            (user(1, None), user(2, None), true),
            (user(1, Some("/a")), user(1, None), false),
            (user(1, Some("/a")), user(1, Some("/a/b")), false),
            (user(1, Some("/a")), user(1, Some("/ab")), true),
            (anybody("/a"), user(9, None), false),
            (anybody("/a"), user(9, Some("/b")), true),
            (anybody("/a"), anybody("/"), false),
            (Principal::Kernel, Principal::Kernel, false),
            (Principal::Kernel, user(0, None), true),
        ] {
            let other = target(&["10.0.0.1:1"], [user(8, Some("/elsewhere")), other.clone()])?;
            let one = allows(one.clone())?;
            let sevens = target(
                &["10.0.0.1:1"],
                one.principals.iter().filter(|one| **one != user(7, None)).cloned(),
            )?;
            assert_eq!(contradiction(&sevens, &other).is_some(), clash, "{sevens:?} {other:?}");
        }
        // A grant adds others, and not those whom the file allows.
        let granting = Target {
            grants: true,
            ..target(&["10.0.0.1:1"], [user(2, None)])?
        };
        assert!(contradiction(&granting, &allows(user(1, None))?).is_some());
        Ok(())
    }
}
