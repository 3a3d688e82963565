//! The file of versions that kept addresses only.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Deserialize;

use crate::{
    policy::Name,
    resolve::{Known, KnownName},
};

pub(super) const FILE: &str = "names.json";
const SCHEMA: &str = "enforcer/names/1";

#[derive(Deserialize)]
struct Saved {
    schema: String,
    names: BTreeMap<String, BTreeSet<IpAddr>>,
}

pub(super) fn parse(bytes: &[u8]) -> Option<Known> {
    let saved: Saved = serde_json::from_slice(bytes)
        .ok()
        .filter(|saved: &Saved| saved.schema == SCHEMA)?;
    let known = |current| KnownName {
        current,
        ..KnownName::default()
    };
    let names = saved.names.into_iter();
    let named = names.filter_map(|(name, addresses)| Some((Name::parse(&name).ok()?, known(addresses))));
    Some(named.collect())
}
