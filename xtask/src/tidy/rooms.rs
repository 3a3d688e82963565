//! Which module of `enforcer/src` imports which: only what stands below it, in the order that
//! `enforcer/docs/architecture.md` gives, and nothing that the module's line there names besides. Tests may import
//! whatever they compare with.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Complaint, Files,
    ratchet::{self, Exceptions},
    source::{Source, Token},
};

/// The page that has the modules.
const PAGE: &str = "enforcer/docs/architecture.md";
/// The heading of the list.
const HEADING: &str = "### From the ground up";
/// Where modules are.
const SOURCES: &str = "enforcer/src/";

/// A top-level module, as the list has it.
struct Room<'a> {
    name: &'a str,
    /// Modules below that it must not import all the same, or parts of them.
    never: Vec<&'a str>,
    line: usize,
}

/// Every import that should not be, and every exception that is none any more.
pub(super) fn check(files: &Files, sources: &[Source], exceptions: &Exceptions) -> Vec<Complaint> {
    let page = files.get(PAGE).map_or("", String::as_str);
    let rooms = list(page);
    let mut complaints = compare(page, &rooms, sources);
    let mut used: BTreeSet<(&str, &str)> = BTreeSet::new();
    for source in sources {
        let Some(room) = room_of(&source.path) else { continue };
        let Some(floor) = rooms.iter().position(|one| one.name == room) else {
            continue;
        };
        let mut faults = BTreeSet::new();
        for (path, line) in imports(source) {
            let Some((to, why)) = fault(&rooms, floor, &path) else {
                continue;
            };
            let excepted = exceptions
                .arrows
                .iter()
                .find(|arrow| arrow.from == room && arrow.to == to);
            match excepted {
                Some(arrow) => drop(used.insert((&arrow.from, &arrow.to))),
                None => drop(faults.insert((line, to, why))),
            }
        }
        complaints.extend(faults.into_iter().map(|(line, to, why)| {
            let what = format!("{room} imports {to}, {why}");
            let remedy = "move what both use into a module below both, or this into one above";
            Complaint::new(&source.path, line, what, remedy)
        }));
    }
    for arrow in &exceptions.arrows {
        if !used.contains(&(arrow.from.as_str(), arrow.to.as_str())) {
            let line = exceptions.line_of("arrows", &format!("from = {:?}", arrow.from));
            let what = format!("{} does not import {} any more", arrow.from, arrow.to);
            complaints.push(Complaint::new(ratchet::FILE, line, what, "remove this exception"));
        }
    }
    complaints
}

/// The list: of each numbered line the names in backticks, the module's first.
fn list(page: &str) -> Vec<Room<'_>> {
    let lines = page
        .lines()
        .enumerate()
        .skip_while(|(_, line)| *line != HEADING)
        .skip(1);
    let items = lines.take_while(|(_, line)| !line.starts_with('#'));
    let rooms = items.filter_map(|(at, line)| {
        let (number, item) = line.split_once(". ")?;
        number.parse::<u32>().ok()?;
        let mut names = item.split('`').skip(1).step_by(2);
        Some(Room {
            name: names.next()?,
            never: names.collect(),
            line: at + 1,
        })
    });
    rooms.collect()
}

/// The list against the table above it and the modules that there are.
fn compare(page: &str, rooms: &[Room<'_>], sources: &[Source]) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let there: BTreeMap<&str, &str> = sources
        .iter()
        .filter_map(|source| Some((room_of(&source.path)?, source.path.as_str())))
        .collect();
    for (room, path) in &there {
        if !rooms.iter().any(|one| one.name == *room) {
            let remedy = format!("put it where it belongs below {HEADING:?} in {PAGE}");
            complaints.push(Complaint::new(
                path,
                1,
                format!("module {room} is not in the list"),
                remedy,
            ));
        } else if !page.lines().any(|line| line.starts_with(&format!("| `{room}.rs`"))) {
            let remedy = format!("write a line that begins with \"| `{room}.rs` |\"");
            complaints.push(Complaint::new(
                PAGE,
                1,
                format!("the table of modules has no {room}"),
                remedy,
            ));
        }
    }
    for room in rooms.iter().filter(|room| !there.contains_key(room.name)) {
        complaints.push(Complaint::new(
            PAGE,
            room.line,
            format!("there is no module {}", room.name),
            "remove this line",
        ));
    }
    complaints
}

/// The top-level module that a file is in; what has all of them together is in none.
fn room_of(path: &str) -> Option<&str> {
    let name = path.strip_prefix(SOURCES)?.split('/').next()?;
    let name = name.strip_suffix(".rs").unwrap_or(name);
    (!["lib", "main"].contains(&name)).then_some(name)
}

/// What of an import the module on a floor must not have, and why.
fn fault<'a>(rooms: &[Room<'a>], floor: usize, path: &[&str]) -> Option<(&'a str, &'static str)> {
    let of = rooms.get(floor)?;
    let to = path.first()?;
    let forbidden = |never: &&&str| {
        never
            .split("::")
            .enumerate()
            .all(|(at, part)| path.get(at) == Some(&part))
    };
    if let Some(never) = of.never.iter().find(forbidden) {
        return Some((never, "which its line in the list of modules forbids"));
    }
    let above = rooms.get(floor + 1..)?.iter().find(|room| room.name == *to)?;
    Some((above.name, "which stands above it"))
}

/// Paths that begin at the crate, each with its line.
fn imports(source: &Source) -> Vec<(Vec<&str>, usize)> {
    let tests = source.tests();
    let tokens: Vec<Token<'_>> = source
        .tokens()
        .into_iter()
        .filter(|token| !token.is_comment())
        .collect();
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let begins = at == 0 || tokens.get(at - 1).is_none_or(|before| before.text != "::");
        let tested = tests.iter().any(|range| range.contains(&token.line));
        if !begins || tested || !["crate", "super"].contains(&token.text) {
            continue;
        }
        let mut paths = Vec::new();
        walk(&tokens, &mut { at }, &[], &mut paths);
        let depth = source.path.trim_start_matches(SOURCES).split('/').count();
        for (path, line) in paths {
            let ups = path.iter().take_while(|part| **part == "super").count();
            // As many `super` as the file is deep lead to the crate.
            if path.first() == Some(&"crate") || ups == depth {
                found.push((path.into_iter().skip(ups.max(1)).collect(), line));
            }
        }
    }
    found
}

/// Every path of a tree as `use` has it, from one of its tokens on.
fn walk<'a>(tokens: &[Token<'a>], at: &mut usize, before: &[&'a str], paths: &mut Vec<(Vec<&'a str>, usize)>) {
    let mut line = 0;
    let mut path = before.to_vec();
    while let Some(token) = tokens.get(*at) {
        *at += 1;
        if token.text == "{" {
            while tokens.get(*at).is_some_and(|token| token.text != "}") {
                walk(tokens, at, &path, paths);
                while tokens.get(*at).is_some_and(|token| ![",", "}"].contains(&token.text)) {
                    *at += 1;
                }
                if tokens.get(*at).is_some_and(|token| token.text == ",") {
                    *at += 1;
                }
            }
            *at += 1;
            return;
        }
        path.push(token.text);
        line = token.line;
        if tokens.get(*at).is_none_or(|token| token.text != "::") {
            break;
        }
        *at += 1;
    }
    paths.push((path, line));
}
