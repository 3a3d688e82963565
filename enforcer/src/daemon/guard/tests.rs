//! Repair, pauses, refusals and what is held, over a store that is made up.

use std::{fs, path::Path, time::Duration};

use super::*;
use crate::{
    daemon::fake::{Drifted, Fake},
    grants::{Asker, Grantee, Grants, Key, Term},
    inputs::{HostConfig, SavedRun},
    jobs::JobRules,
    policy::Uid,
};

type Test = Result<(), Box<dyn std::error::Error>>;

const SECOND: Duration = Duration::from_secs(1);

fn inputs(dir: &Path, endpoints: &str) -> Result<Inputs, Box<dyn std::error::Error>> {
    let path = dir.join("enforcer.toml");
    let text =
        format!("backend = \"nftables\"\n[target.t]\nendpoints = [{endpoints}]\nallow = [\"root\"]\ngrants = true\n");
    fs::write(&path, text)?;
    let config = HostConfig::load(&path)?;
    let (saved, _) = SavedRun::load(dir);
    Ok(Inputs::new(
        config,
        &saved,
        Grants::default(),
        JobRules::default(),
        Instant::now(),
    )?)
}

fn grant(inputs: &mut Inputs, uid: u32, now: Instant) -> Test {
    let key = Key {
        target: "t".to_owned(),
        to: Grantee::User(Uid(uid)),
    };
    let term = Term {
        since: jiff::Timestamp::UNIX_EPOCH,
        expires: None,
        by: Asker {
            pid: 1,
            uid: 0,
            comm: "test".to_owned(),
            ..Asker::default()
        },
        own: false,
    };
    inputs.grants.grant(key, term)?;
    assert!(inputs.settle(now).policy);
    Ok(())
}

/// A guard of one target that is active.
struct Scene {
    dir: tempfile::TempDir,
    store: Fake,
    guard: Guard,
    inputs: Inputs,
    now: Instant,
}

impl Scene {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let mut scene = Self {
            inputs: inputs(dir.path(), "\"tcp://192.0.2.1:4222\"")?,
            dir,
            store: Fake::default(),
            guard: Guard::default(),
            now: Instant::now(),
        };
        assert!(
            scene
                .step(false)
                .is_some_and(|found| matches!(found.applied, Ok(Some(_))) && !found.drifted)
        );
        Ok(scene)
    }

    /// A second later.
    fn step(&mut self, again: bool) -> Option<Reconciled> {
        self.now += SECOND;
        self.guard.reconcile(&mut self.store, &self.inputs, again, self.now)
    }
}

/// A start: nothing is active of this process yet.
struct Start {
    store: Fake,
    guard: Guard,
    inputs: Inputs,
    now: Instant,
    _dir: tempfile::TempDir,
}

impl Start {
    fn new(store: Fake, endpoint: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            store,
            guard: Guard::default(),
            inputs: inputs(dir.path(), &format!("\"{endpoint}\""))?,
            now: Instant::now(),
            _dir: dir,
        })
    }

    fn begin(&mut self, has_record: bool) -> Result<Option<Applied>, DaemonError> {
        self.guard.begin(&mut self.store, &self.inputs, has_record, self.now)
    }

    fn resume(&mut self) -> Result<Option<Applied>, DaemonError> {
        self.guard.resume(&mut self.store, &self.inputs, self.now)
    }

    /// What the kernel holds is the last known good rules, or is not.
    fn fall_back(&mut self, is_active: bool) -> Result<Option<Applied>, DaemonError> {
        if is_active {
            let rules = self.inputs.desired(self.now)?.rules;
            self.store.kernel().applied.push(rules);
        }
        self.guard.fall_back(&mut self.store, &self.inputs, 0, self.now)
    }
}

const ADDRESS: &str = "tcp://192.0.2.1:4222";
const NAME: &str = "tcp://bus.example:4222";

#[test]
fn a_first_start_makes_its_configuration_active() -> Test {
    // Names without an address are no obstacle where nothing guards them.
    for endpoint in [ADDRESS, NAME] {
        let mut start = Start::new(Fake::default(), endpoint)?;
        assert_eq!(start.begin(false)?.map(|applied| applied.generation), Some(1));
        assert!(start.guard.is_active() && !start.guard.is_held());
    }
    Ok(())
}

#[test]
fn a_start_without_a_record_opens_nothing_that_is_guarded() -> Test {
    let mut start = Start::new(Fake::guarding(&["t"]), NAME)?;
    assert!(start.begin(false)?.is_none());
    assert_eq!(start.guard.hold, Hold::UntilResolved);
    assert!(start.store.kernel().applied.is_empty() && !start.guard.is_active());
    // Where the record tells the addresses, where all are known, and where other targets are guarded.
    let mut others = [
        (Start::new(Fake::guarding(&["t"]), NAME)?, true),
        (Start::new(Fake::guarding(&["t"]), ADDRESS)?, false),
        (Start::new(Fake::guarding(&["another"]), NAME)?, false),
    ];
    for (start, has_record) in &mut others {
        assert_eq!(start.begin(*has_record)?.map(|applied| applied.generation), Some(6));
    }
    Ok(())
}

#[test]
fn a_start_that_the_kernel_refuses_is_none() -> Test {
    let mut start = Start::new(Fake::default(), ADDRESS)?;
    start.store.kernel().refuses = true;
    assert!(start.begin(false).is_err() && start.resume().is_err());
    assert!(!start.guard.is_active() && !start.guard.is_held());
    Ok(())
}

#[test]
fn the_last_known_good_rules_become_active_where_none_are() -> Test {
    let mut start = Start::new(Fake::default(), ADDRESS)?;
    assert!(start.resume()?.is_some() && start.guard.is_active());
    let mut start = Start::new(Fake::guarding(&["t"]), ADDRESS)?;
    assert!(start.resume()?.is_none());
    assert!(start.store.kernel().applied.is_empty() && !start.guard.is_active() && !start.guard.is_held());
    Ok(())
}

#[test]
fn a_refused_configuration_falls_back_to_what_is_active() -> Test {
    // To what this process made active.
    let mut start = Start::new(Fake::default(), ADDRESS)?;
    start.resume()?;
    assert!(start.fall_back(false)?.is_none() && !start.guard.is_held());
    // To what another one did, if it is the last known good rules.
    let mut start = Start::new(Fake::guarding(&["t"]), ADDRESS)?;
    start.resume()?;
    assert!(start.fall_back(true)?.is_some() && start.guard.is_active() && !start.guard.is_held());
    // If it is something else it stays, until a configuration is taken.
    let mut start = Start::new(Fake::guarding(&["t"]), ADDRESS)?;
    start.resume()?;
    assert!(start.fall_back(false)?.is_none());
    assert_eq!(start.guard.hold, Hold::UntilConfigured);
    assert!(start.store.kernel().applied.is_empty());
    start
        .guard
        .apply_configured(&mut start.store, &start.inputs, start.now)?;
    assert!(start.guard.is_active() && !start.guard.is_held());
    Ok(())
}

#[test]
fn what_has_not_changed_is_kept_and_what_has_is_applied() -> Test {
    let mut scene = Scene::new()?;
    let found = scene.step(false).ok_or("it rests")?;
    assert!(matches!(found.applied, Ok(None)));
    assert_eq!(scene.store.kernel().applied.len(), 1);
    assert_eq!(scene.store.kernel().kept, [1]);
    grant(&mut scene.inputs, 7, scene.now)?;
    let applied = scene.step(false).ok_or("it rests")?.applied?.ok_or("it is kept")?;
    assert_eq!(applied.generation, 2);
    let applied = scene.store.kernel().applied.clone();
    assert_ne!(applied.first(), applied.last());
    assert!(matches!(scene.step(false).ok_or("it rests")?.applied, Ok(None)));
    Ok(())
}

#[test]
fn a_refused_change_leaves_active_what_is_and_is_tried_again() -> Test {
    let mut scene = Scene::new()?;
    grant(&mut scene.inputs, 7, scene.now)?;
    scene.store.kernel().refuses = true;
    assert!(scene.step(false).ok_or("it rests")?.applied.is_err());
    assert!(scene.step(true).ok_or("it rests")?.applied.is_err());
    scene.store.kernel().refuses = false;
    assert_eq!(
        scene
            .step(true)
            .ok_or("it rests")?
            .applied?
            .ok_or("it is kept")?
            .generation,
        2
    );
    Ok(())
}

#[test]
fn inputs_that_return_after_a_refusal_are_what_is_active() -> Test {
    let mut scene = Scene::new()?;
    let before = scene.inputs.clone();
    grant(&mut scene.inputs, 7, scene.now)?;
    scene.store.kernel().refuses = true;
    assert!(scene.guard.apply(&mut scene.store, &scene.inputs, scene.now).is_err());
    scene.inputs = before;
    scene.store.kernel().refuses = false;
    assert!(
        matches!(scene.step(false).ok_or("it rests")?.applied, Ok(None)),
        "nothing is to be applied"
    );
    Ok(())
}

#[test]
fn inputs_that_return_after_they_were_replaced_are_applied() -> Test {
    let mut scene = Scene::new()?;
    let before = scene.inputs.clone();
    grant(&mut scene.inputs, 7, scene.now)?;
    scene.guard.apply(&mut scene.store, &scene.inputs, scene.now)?;
    // Another grant has the revision that the one taken back had.
    scene.inputs = before;
    grant(&mut scene.inputs, 8, scene.now)?;
    assert!(matches!(scene.step(false).ok_or("it rests")?.applied, Ok(Some(_))));
    assert_eq!(
        scene.store.kernel().applied.last(),
        Some(&scene.inputs.desired(scene.now)?.rules)
    );
    Ok(())
}

#[test]
fn what_others_take_is_put_back_at_once_but_not_for_ever() -> Test {
    let mut scene = Scene::new()?;
    for _ in 0..5 {
        scene.store.kernel().drift = Some(Drifted::Part);
        let found = scene.step(false).ok_or("it rests")?;
        assert!(found.drifted && matches!(found.applied, Ok(None)));
    }
    assert!(
        scene
            .guard
            .reconcile(&mut scene.store, &scene.inputs, false, scene.now)
            .is_none(),
        "it pauses"
    );
    assert!(scene.step(false).is_some());
    Ok(())
}

#[test]
fn another_generation_is_replaced() -> Test {
    let mut scene = Scene::new()?;
    scene.store.kernel().drift = Some(Drifted::Replaced);
    let found = scene.step(false).ok_or("it rests")?;
    assert_eq!(found.applied?.ok_or("it is kept")?.generation, 2);
    Ok(())
}

#[test]
fn what_cannot_be_put_back_is_said_and_made_anew() -> Test {
    let mut scene = Scene::new()?;
    scene.store.kernel().drift = Some(Drifted::Part);
    scene.store.kernel().refuses = true;
    let found = scene.step(false).ok_or("it rests")?;
    assert!(found.drifted && found.applied.is_err());
    scene.store.kernel().refuses = false;
    assert!(matches!(scene.step(true).ok_or("it rests")?.applied, Ok(Some(_))));
    Ok(())
}

#[test]
fn what_is_held_until_a_configuration_is_taken_stays() -> Test {
    let mut scene = Scene::new()?;
    scene.guard.hold = Hold::UntilConfigured;
    grant(&mut scene.inputs, 7, scene.now)?;
    assert!(scene.step(true).is_none());
    assert!(matches!(
        scene.guard.apply(&mut scene.store, &scene.inputs, scene.now),
        Err(DaemonError::Frozen)
    ));
    scene.store.kernel().refuses = true;
    assert!(
        scene
            .guard
            .apply_configured(&mut scene.store, &scene.inputs, scene.now)
            .is_err()
    );
    assert!(scene.guard.is_held(), "a refused configuration lets nothing go");
    scene.store.kernel().refuses = false;
    scene
        .guard
        .apply_configured(&mut scene.store, &scene.inputs, scene.now)?;
    assert!(!scene.guard.is_held());
    Ok(())
}

#[test]
fn what_is_held_until_names_are_known_goes_on_by_itself() -> Test {
    let mut scene = Scene::new()?;
    scene.inputs = inputs(scene.dir.path(), "\"tcp://bus.example:4222\"")?;
    scene.guard.hold = Hold::UntilResolved;
    assert!(scene.step(false).is_none());
    let name = scene.inputs.policy().names().into_iter().next().ok_or("no name")?;
    let addresses = ["192.0.2.7".parse()?].into();
    scene
        .inputs
        .names
        .answered(scene.now, &name, crate::resolve::LookupAnswer::Hosts(addresses));
    assert!(matches!(scene.step(false).ok_or("it rests")?.applied, Ok(Some(_))));
    Ok(())
}
