//! The machine, and what else it does: figures are no better than it was quiet.

use std::{
    fmt, fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// For how long the machine is looked at, while the bench does nothing.
const LOOK: Duration = Duration::from_secs(2);
/// What others may take of one processor before the bench warns.
const LOUD: f64 = 0.1;
/// Ticks of `/proc/stat` in a second (`USER_HZ`, which is part of the ABI).
const TICKS: f64 = 100.0;

/// Where a run took place.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// Name of the processor.
    pub processor: String,
    /// Processors that may be used.
    pub processors: usize,
    /// How their frequency is governed, where the kernel tells.
    pub governor: Option<String>,
}

/// What others do on it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Conditions {
    /// What others took, in processors.
    pub busy: f64,
    /// Of that, what another virtual machine took.
    pub stolen: f64,
    /// The load average of the last minute.
    pub load: f64,
}

impl Machine {
    /// Looks.
    pub(super) fn here() -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let name = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let governor = fs::read_to_string("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: name.map_or("unknown", |(_, name)| name).to_owned(),
            processors: thread::available_parallelism()?.get(),
            governor: governor.ok().map(|governor| governor.trim().to_owned()),
        })
    }

    /// What about it makes figures doubtful.
    #[must_use]
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if cfg!(debug_assertions) {
            warnings.push("this is a debug build: all that runs outside the kernel is slower than it is".to_owned());
        }
        if self.processors < 2 {
            warnings.push(
                "there is one processor: what is measured shares it with the bench and with the other end of each \
                 connection"
                    .to_owned(),
            );
        }
        match self.governor.as_deref() {
            Some("performance") | None => {}
            Some(other) => warnings.push(format!(
                "the frequency of the processors is governed by {other:?}; times change with it, ratios less: \
                 cpupower frequency-set -g performance"
            )),
        }
        warnings
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let governor = self.governor.as_deref().unwrap_or("not told");
        write!(
            f,
            "Linux {}, {} × {}, frequency governor {governor}",
            self.kernel, self.processors, self.processor
        )
    }
}

impl Conditions {
    /// Looks for a while.
    pub(super) fn now() -> Result<Self> {
        let (before, started) = (ticks()?, Instant::now());
        thread::sleep(LOOK);
        let (after, took) = (ticks()?, started.elapsed().as_secs_f64());
        let load = fs::read_to_string("/proc/loadavg")?;
        let load = load.split(' ').next().and_then(|word| word.parse().ok());
        Ok(Self {
            busy: (after.0 - before.0) / TICKS / took,
            stolen: (after.1 - before.1) / TICKS / took,
            load: load.context("/proc/loadavg has no number")?,
        })
    }

    /// What of it makes figures doubtful.
    #[must_use]
    pub(super) fn warning(&self, when: &str) -> Option<String> {
        (self.busy > LOUD).then(|| {
            format!(
                "{when} the run others took {:.2} processors; the figures are of a loaded machine: stop them, and run \
                 this again",
                self.busy
            )
        })
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { busy, stolen, load } = self;
        write!(
            f,
            "others took {busy:.2} processors ({stolen:.2} of them other virtual machines), load average {load:.2}"
        )
    }
}

/// What all processors together spent on anything, and of it what was stolen.
fn ticks() -> Result<(f64, f64)> {
    let stat = fs::read_to_string(Path::new("/proc/stat"))?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, _idle, _waiting, irq, softirq, stolen, ..] = fields.as_slice() else {
        anyhow::bail!("/proc/stat begins with {line:?}");
    };
    Ok((user + nice + system + irq + softirq + stolen, *stolen))
}
