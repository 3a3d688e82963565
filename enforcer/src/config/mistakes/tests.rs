//! What is said of files with many mistakes: all of it, in order.

use std::path::Path;

use super::{MAX_LISTED, Mistake};
use crate::{
    config::{Config, ConfigError, Mistakes},
    policy::{FileUsers, Policy},
};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// As a start reads it, on a host whose only user is root.
fn mistakes(text: &str) -> Fallible<Mistakes> {
    let users = FileUsers {
        passwd: "root:x:0:0:::\n".to_owned(),
        ..FileUsers::default()
    };
    let read = Config::parse(text, Path::new("x.toml"));
    match read.and_then(|config| Ok(Policy::from_config(&config, &users)?)) {
        Err(ConfigError::Invalid(mistakes)) => Ok(mistakes),
        Err(error) => Err(error.into()),
        Ok(read) => Err(format!("{text:?} was taken for {read:?}").into()),
    }
}

/// The listings are there to be read: whoever changes a message sees here what becomes of it.
#[test]
fn all_mistakes_of_a_file_are_listed_at_once() -> Fallible<()> {
    for (text, listing) in [
        (include_str!("many.toml"), include_str!("many.txt")),
        (include_str!("targets.toml"), include_str!("targets.txt")),
    ] {
        let listed = mistakes(text)?.lines().join("\n") + "\n";
        assert!(listed == listing, "the listing is now\n{listed}");
    }
    Ok(())
}

/// A file, and the lines of its mistakes.
#[test]
fn one_mistake_hides_no_other_and_makes_up_none() -> Fallible<()> {
    for (text, lines) in [
        // Of meaning alone, in two targets.
        (
            "[target.a]\nendpoints = [\"nowhere\"]\nallow = [-1]\n[target.b]\nendpoints = [\"a:b\"]\nallow = []\n",
            &[2, 3, 5][..],
        ),
        // A missing key beside meaning.
        ("[target.a]\nendpoints = [\"a:b\", \"c:d\"]\n", &[1, 2, 2]),
        // What is compared is right by itself, and compared with what is there.
        ("[dns]\nmin_refresh = \"2m\"\nmax_refresh = \"3m\"\nretain = 5\n", &[4]),
        ("[dns]\nmin_refresh = \"2m\"\nmax_refresh = 5\n", &[3]),
        ("[dns]\nretain = 5\nmin_refresh = \"2m\"\n", &[2, 3]),
        // A principal is one thing.
        (
            "[target.a]\nendpoints = []\nallow = [{ user = 5.5, cgroup = \"/a\" }]\n",
            &[3],
        ),
        // Whatever is refused as a whole is refused once.
        ("dns = [1, 2, 3]\n", &[1]),
        ("target = [1, 2, 3]\n[bosh]\ndir = 5\n", &[1, 3]),
        ("[a]\nb = 1\nc = 2\n[d.e.f.g.h]\ni = 1\n", &[1, 4]),
        // Not TOML: nothing else is known.
        ("mode = 5\nbackend = [\n", &[2]),
        // A string without its end is named by its own line.
        ("[target.a]\nendpoints = [\"10.0.0.1:1]\nallow = [\"root\"]\n", &[2]),
        ("[target.a]\nendpoints = [\n\"10.0.0.1:1,\n\"10.0.0.2:2\"\n]\n", &[3]),
    ] {
        let found = mistakes(text)?;
        let at: Vec<usize> = found.iter().filter_map(Mistake::line).collect();
        assert_eq!(at, lines, "{text}\n{}", found.lines().join("\n"));
    }
    Ok(())
}

#[test]
fn a_million_mistakes_are_as_many_lines_as_a_person_reads() -> Fallible<()> {
    let many = |element: &str| {
        format!(
            "[target.a]\nallow = []\nendpoints = [\n{}]\n",
            format!("{element},\n").repeat(50_000)
        )
    };
    for element in ["5", "\"nowhere\""] {
        let found = mistakes(&many(element))?;
        let lines = found.lines();
        assert_eq!(lines.len(), MAX_LISTED + 1);
        let last = lines.last().map(String::as_str);
        assert_eq!(last, Some(format!("and {} more", 50_000 - MAX_LISTED).as_str()));
        assert!(
            lines.first().is_some_and(|line| line.starts_with("x.toml:4: ")),
            "{lines:?}"
        );
        let said = found.to_string();
        assert!(
            said.contains(" (and 49999 more: enforcer config check") && !said.contains('\n'),
            "{said}"
        );
    }
    Ok(())
}

#[test]
fn a_mistake_says_its_target_and_key() -> Fallible<()> {
    for (text, target, key) in [
        ("moed = 1", None, Some("moed")),
        ("mode = 1", None, Some("mode")),
        ("[dns]\nmoed = 1", None, Some("dns.moed")),
        ("[dns]\nretain = 1", None, Some("dns.retain")),
        ("[dns]\nmin_refresh = \"2m\"", None, Some("dns.min_refresh")),
        ("nat64 = [5]", None, Some("nat64")),
        ("mode = ", None, None),
        ("[target.a]\nendpoints = []", Some("a"), Some("allow")),
        ("[target.a]\nallow = []\nendpoints = [5]", Some("a"), Some("endpoints")),
        (
            "[target.a]\nallow = []\nendpoints = [\"x\"]",
            Some("a"),
            Some("endpoints"),
        ),
        ("[target.a]\nendpoints = []\nallow = [-1]", Some("a"), Some("allow")),
        (
            "[target.a]\nendpoints = []\nallow = [{ user = [] }]",
            Some("a"),
            Some("allow"),
        ),
        ("[target.a]\nendpoints = []\nallow = []\nx = 1", Some("a"), Some("x")),
    ] {
        let found = mistakes(text)?;
        let only = found.iter().next().ok_or("none")?;
        assert_eq!((only.target(), only.key().as_deref()), (target, key), "{text:?}");
        assert!(only.to_string().ends_with(&only.message()), "{text:?}");
        assert_eq!(found.lines().len(), 1, "{text:?}");
    }
    Ok(())
}
