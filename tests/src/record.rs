//! A line of JSON for every case that begins or ends, to the file named by `ENFORCER_TEST_RECORD`: how a guest's
//! results leave it.

use std::{
    env,
    fs::{File, OpenOptions},
    io::Write as _,
    sync::Mutex,
    time::Instant,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// Where to.
pub const RECORD: &str = "ENFORCER_TEST_RECORD";
/// Longest error that is recorded: a serial line is slow.
const LONGEST: usize = 6000;

/// The file, where one is wanted.
#[derive(Debug)]
pub struct Record(Option<Mutex<File>>);

impl Record {
    /// Opens the file that the environment names.
    pub fn open() -> Result<Self> {
        let Some(path) = env::var_os(RECORD) else {
            return Ok(Self(None));
        };
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let file = file.with_context(|| format!("open {RECORD} {}", path.display()))?;
        Ok(Self(Some(Mutex::new(file))))
    }

    /// Writes a line whole.
    pub fn say(&self, value: &Value) -> Result<()> {
        if let Some(file) = &self.0 {
            let mut file = file.lock().ok().context("the record is poisoned")?;
            file.write_all(format!("{value}\n").as_bytes())?;
        }
        Ok(())
    }

    /// Runs a case between two lines.
    pub fn case(&self, name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
        self.say(&json!({ "began": name }))?;
        let started = Instant::now();
        let result = run();
        let error = result.as_ref().err().map(|error| {
            let text = format!("{error:?}");
            text.chars().take(LONGEST).collect::<String>()
        });
        self.say(&json!({ "ended": name, "seconds": started.elapsed().as_secs_f64(), "error": error }))?;
        result
    }
}
