//! The shape of a file: how it opens, how wide its lines are, and how long it is.

use std::collections::BTreeMap;

use super::{
    Complaint,
    ratchet::{Exceptions, Rule},
    source::Source,
};

/// Columns of a line.
pub(super) const WIDTH: usize = 120;

/// Every fault of shape.
pub(super) fn check(sources: &[Source], exceptions: &Exceptions) -> Vec<Complaint> {
    let mut complaints: Vec<Complaint> = sources.iter().filter_map(opening).collect();
    for source in sources {
        let lines = wide_lines(source);
        let allowed = exceptions.allowed(Rule::Wide, &source.path);
        if lines.len() > allowed {
            complaints.extend(lines.iter().map(|(line, columns)| {
                let what = match allowed {
                    0 => format!("{columns} columns"),
                    _ => format!(
                        "{columns} columns, one of {} such lines, of which {allowed} are allowed",
                        lines.len()
                    ),
                };
                Complaint::new(
                    &source.path,
                    *line,
                    what,
                    format!("break it before column {}", WIDTH + 1),
                )
            }));
        }
        let (length, allowed) = (length(source), exceptions.allowed(Rule::Length, &source.path));
        if length > allowed {
            let what = format!("{length} lines without tests, of which {allowed} are allowed");
            complaints.push(Complaint::new(
                &source.path,
                1,
                what,
                "give its second subject a file of its own",
            ));
        }
    }
    complaints.extend(exceptions.loose(Rule::Wide, &counts(sources, |source| wide_lines(source).len())));
    complaints.extend(exceptions.loose(Rule::Length, &counts(sources, length)));
    complaints
}

/// What there is in each file.
pub(super) fn counts(sources: &[Source], count: impl Fn(&Source) -> usize) -> BTreeMap<&str, usize> {
    sources
        .iter()
        .map(|source| (source.path.as_str(), count(source)))
        .collect()
}

fn opening(source: &Source) -> Option<Complaint> {
    let what = "does not open with //!";
    (!source.text.starts_with("//!"))
        .then(|| Complaint::new(&source.path, 1, what, "say there what the file is, in a line or three"))
}

/// Lines that are too wide, with their columns. A line may be wider that is a single word, as a URL, or has a part of a
/// raw string, which cannot go on on another line.
pub(super) fn wide_lines(source: &Source) -> Vec<(usize, usize)> {
    let columns = |line: &str| line.chars().count();
    let mut wide: Vec<(usize, usize)> = Vec::new();
    for (at, line) in source.text.lines().enumerate() {
        let words = line.trim_start_matches(['/', '!', ' ']).split_whitespace().count();
        if columns(line) > WIDTH && words > 1 {
            wide.push((at + 1, columns(line)));
        }
    }
    if !wide.is_empty() {
        for token in source.tokens() {
            if token.kind == "raw_string_literal" {
                let last = token.line + token.text.lines().count().saturating_sub(1);
                wide.retain(|(line, _)| !(token.line..=last).contains(line));
            }
        }
    }
    wide
}

/// Lines that are not tests'.
pub(super) fn length(source: &Source) -> usize {
    let tests = source.tests();
    let lines = 1..=source.text.lines().count();
    lines
        .filter(|line| !tests.iter().any(|range| range.contains(line)))
        .count()
}
