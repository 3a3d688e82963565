//! Targets in files of their own.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::PathBuf,
};

use tempfile::TempDir;

use super::{Config, ConfigError, Trust, load_from, modified};
use crate::config::Bosh;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const TARGET: &str = "endpoints = [\"tcp://10.0.0.1:1\"]\nallow = [\"root\"]\n";

/// A directory with `main.toml` and, in `conf.d`, other files.
struct Place(TempDir);

impl Place {
    fn new(main: &str) -> Fallible<Self> {
        let place = Self(TempDir::new()?);
        fs::write(place.main(), main)?;
        fs::create_dir(place.path("conf.d"))?;
        Ok(place)
    }

    fn main(&self) -> PathBuf {
        self.path("main.toml")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn add(&self, name: &str, text: &str) -> Fallible<()> {
        Ok(fs::write(self.path("conf.d").join(name), text)?)
    }

    /// What is said of it, a line each, without the directory.
    fn refused(&self) -> Fallible<Vec<String>> {
        let error = match Config::load(&self.main()) {
            Ok(config) => return Err(format!("{config:?}").into()),
            Err(error) => error,
        };
        let lines = error
            .mistakes()
            .map_or_else(|| vec![error.to_string()], super::Mistakes::lines);
        let dir = format!("{}/", self.0.path().display());
        Ok(lines.iter().map(|line| line.replace(&dir, "")).collect())
    }

    fn targets(&self) -> Fallible<Vec<String>> {
        Ok(Config::load(&self.main())?.targets.into_keys().collect())
    }
}

#[test]
fn files_beside_add_targets() -> Fallible<()> {
    let place = Place::new(&format!("mode = \"audit\"\n[target.m]\n{TARGET}"))?;
    place.add("a.toml", &format!("[target.a]\n{TARGET}[target.b]\n{TARGET}"))?;
    place.add("b.toml", "# nothing yet\n")?;
    for other in [".hidden.toml", "c.toml~", "d.toml.dpkg-new", "README"] {
        place.add(other, "nonsense")?;
    }
    assert_eq!(place.targets()?, ["a", "b", "m"]);
    let config = Config::load(&place.main())?;
    assert_eq!(config.bosh, None);
    let of = |name| {
        config
            .targets
            .get(name)
            .map(|target| (target.path.clone(), target.line))
    };
    assert_eq!(of("b"), Some((place.path("conf.d/a.toml"), 4)));
    assert_eq!(of("m"), Some((place.main(), 2)));
    // What is wrong there says so, beside what is wrong elsewhere.
    place.add("a.toml", "[target.a]\nendpoints = [\"x\"]\nallow = [\"root\"]\n")?;
    place.add(
        "b.toml",
        "mode = \"enforce\"\nfoo = 1\n[dns]\n[bosh]\ndir = 5\n[target.b]\nallow = 5\n",
    )?;
    place.add("c.toml", "[target.c\n")?;
    fs::write(
        place.main(),
        format!("[target.m]\n{}", TARGET.replace("10.0.0.1", "10.0.0.256")),
    )?;
    let lines = place.refused()?;
    let starts = [
        "main.toml:2: target m: endpoint ",
        "conf.d/a.toml:2: target a: endpoint ",
        "conf.d/b.toml:1: the top of the file has `mode`, which belongs in main.toml; a file in conf.d",
        "conf.d/b.toml:2: the top of the file has an unknown key `foo`; known keys are target",
        "conf.d/b.toml:3: the top of the file has `dns`, which belongs in main.toml",
        "conf.d/b.toml:4: the top of the file has `bosh`, which belongs in main.toml",
        "conf.d/b.toml:6: [target.b] has no endpoints",
        "conf.d/b.toml:7: allow in [target.b] is of type integer",
        "conf.d/c.toml:1: not TOML",
    ];
    assert_eq!(lines.len(), starts.len(), "{lines:#?}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}, not {start}");
    }
    Ok(())
}

#[test]
fn a_target_is_in_one_file() -> Fallible<()> {
    let place = Place::new(&format!("[target.a]\n{TARGET}"))?;
    place.add("a.toml", &format!("\n[target.a]\n{TARGET}[target.b]\n{TARGET}"))?;
    place.add("b.toml", &format!("[target.b]\n{TARGET}"))?;
    assert_eq!(
        place.refused()?,
        [
            "conf.d/a.toml:2: [target.a] is in main.toml:1, too; keep one",
            "conf.d/b.toml:1: [target.b] is in conf.d/a.toml:5, too; keep one",
        ]
    );
    Ok(())
}

#[test]
fn b1_what_is_added_takes_nothing_from_a_bosh_vm() -> Fallible<()> {
    let place = Place::new("")?;
    let agent = place.path("bosh");
    let bosh =
        |may_be_missing| load_from(&place.main(), Trust::Needed, may_be_missing, &agent).map(|config| config.bosh);
    let built_in = Some(Bosh::default());
    for on_a_bosh_vm in [false, true] {
        if on_a_bosh_vm {
            fs::create_dir(&agent)?;
        }
        fs::write(place.main(), "mode = \"audit\"")?;
        place.add("a.toml", "")?;
        assert_eq!(bosh(false)?, built_in);
        place.add("a.toml", &format!("[target.a]\n{TARGET}"))?;
        assert_eq!(bosh(false)?, built_in.clone().filter(|_| on_a_bosh_vm));
        fs::write(place.main(), format!("[target.b]\n{TARGET}"))?;
        assert_eq!(bosh(false)?, None);
        // At the default path, where none is as an empty one.
        fs::remove_file(place.main())?;
        assert_eq!(bosh(true)?, built_in.clone().filter(|_| on_a_bosh_vm));
        assert!(matches!(bosh(false), Err(ConfigError::Missing { .. })));
    }
    Ok(())
}

/// What cannot be read, or is not root's alone, refuses the configuration as a whole.
#[test]
fn f6_only_what_others_cannot_write_is_read() -> Fallible<()> {
    let place = Place::new("")?;
    place.add("a.toml", &format!("[target.a]\n{TARGET}"))?;
    for (name, mode) in [
        ("conf.d", 0o777),
        ("conf.d", 0o1777),
        ("conf.d", 0o775),
        ("conf.d/a.toml", 0o664),
    ] {
        let path = place.path(name);
        let before = fs::metadata(&path)?.permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        let lines = place.refused()?;
        let (shown, mode) = (format!("{name} is owned by uid "), format!("with mode {mode:04o}; "));
        assert!(
            lines.iter().all(|line| line.contains(&shown) && line.contains(&mode)),
            "{lines:?}"
        );
        fs::set_permissions(&path, before)?;
    }
    assert_eq!(place.targets()?, ["a"]);
    // Neither does one file hide what is wrong with another.
    place.add("b.toml", "[target.b]\nallow = 5\n")?;
    fs::set_permissions(place.path("conf.d/a.toml"), fs::Permissions::from_mode(0o646))?;
    fs::write(place.main(), "mode = 5")?;
    let starts = [
        "main.toml:1: mode ",
        "conf.d/a.toml is owned by uid ",
        "conf.d/b.toml:1: ",
        "conf.d/b.toml:2: ",
    ];
    let lines = place.refused()?;
    assert!(
        lines.len() == starts.len() && lines.iter().zip(starts).all(|(line, start)| line.starts_with(start)),
        "{lines:#?}"
    );
    fs::write(place.main(), "")?;
    // What is right can be had alone (F8).
    place.add("c.toml", &format!("[target.c]\n{TARGET}"))?;
    place.add("d.toml", "[target.d]\nendpoints = [\"nowhere\"]\nallow = [\"root\"]\n")?;
    let right = || {
        let right = Config::load_what_is_right(&place.main())?;
        Ok::<_, ConfigError>(right.map(|config| config.targets.into_keys().collect::<Vec<_>>()))
    };
    assert_eq!(right()?, Some(vec!["c".to_owned()]));
    fs::write(place.main(), "mode = 5")?;
    assert!(right().is_err(), "the configuration file itself is wrong");
    // A target that is in two files is the configuration file's.
    fs::write(place.main(), format!("[target.c]\n{TARGET}"))?;
    assert_eq!(right()?, Some(vec!["c".to_owned()]));
    // The built-in ones are not what was written (B1).
    fs::write(place.main(), "")?;
    fs::remove_file(place.path("conf.d/c.toml"))?;
    assert_eq!(right()?, None);
    for name in ["b.toml", "d.toml"] {
        fs::remove_file(place.path("conf.d").join(name))?;
    }
    fs::set_permissions(place.path("conf.d/a.toml"), fs::Permissions::from_mode(0o644))?;
    // By whatever name it has.
    fs::rename(place.path("conf.d"), place.path("elsewhere"))?;
    symlink("elsewhere", place.path("conf.d"))?;
    assert_eq!(place.targets()?, ["a"]);
    fs::create_dir(place.path("conf.d/b.toml"))?;
    assert!(place.refused()?.concat().contains("read conf.d/b.toml: "));
    fs::remove_dir_all(place.path("elsewhere"))?;
    assert!(place.refused()?.concat().contains("read conf.d: "), "a link to nowhere");
    Ok(())
}

#[test]
fn every_change_is_seen() -> Fallible<()> {
    let place = Place::new("")?;
    let mut before = modified(&place.main());
    let mut changes = |what: &str| {
        let now = modified(&place.main());
        assert_ne!(before, now, "{what}");
        before = now;
    };
    place.add("a.toml", "")?;
    changes("a file is new");
    fs::File::options()
        .write(true)
        .open(place.path("conf.d/a.toml"))?
        .set_modified(std::time::SystemTime::UNIX_EPOCH)?;
    changes("it is another one");
    fs::remove_file(place.path("conf.d/a.toml"))?;
    changes("it is gone");
    fs::remove_file(place.main())?;
    changes("the configuration file is gone");
    Ok(())
}
