//! Guarantees: each number that code or a test cites is one of `enforcer/docs/guarantees.md`, each one there is cited
//! by code and names a test, each test named there exists, and no number stands where a user may see it.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Complaint, Files,
    ratchet::{Exceptions, Rule},
    shape::counts,
    source::{Source, Token, is_test},
};

/// The page that has them.
const PAGE: &str = "enforcer/docs/guarantees.md";
/// Code that holds them, of which the first is what users see.
const CODE: [&str; 3] = ["enforcer/src/", "enforcer/client/src/", "enforcer-ebpf/src/"];

/// What the page has.
#[derive(Default)]
struct Page<'a> {
    /// Numbers of guarantees, with their lines and whether a test is named.
    guarantees: BTreeMap<String, (usize, bool)>,
    /// Numbers that may be cited and ask for nothing: aims, and sections.
    others: BTreeSet<String>,
    /// Names of tests, and paths, with their lines.
    tests: Vec<(&'a str, usize)>,
}

/// Every fault.
pub(super) fn check(files: &Files, sources: &[Source], exceptions: &Exceptions) -> Vec<Complaint> {
    let page = Page::parse(files.get(PAGE).map_or("", String::as_str));
    let tokens: Vec<(&Source, Vec<Token<'_>>)> = sources.iter().map(|source| (source, source.tokens())).collect();
    let (mut complaints, mut cited, mut known) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for (source, tokens) in &tokens {
        let code = CODE.iter().any(|start| source.path.starts_with(start)) && !is_test(&source.path);
        for (number, line, by_code) in citations(tokens, &page) {
            if !page.has(&number) {
                let what = format!("there is no guarantee {number}");
                complaints.push(Complaint::new(
                    &source.path,
                    line,
                    what,
                    format!("cite one of {PAGE}, or write it there"),
                ));
            } else if code && by_code {
                cited.insert(number);
            }
        }
        known.extend(names(tokens));
        complaints.extend(seen(source, tokens, &page, exceptions));
    }
    for (number, (line, tested)) in &page.guarantees {
        if !cited.contains(number) {
            let remedy = format!(
                "cite {number} in a comment where the code holds it, below {}",
                CODE.join(", ")
            );
            complaints.push(Complaint::new(PAGE, *line, format!("no code cites {number}"), remedy));
        }
        if !tested {
            let remedy = "name the test in backticks, or the file of the tests";
            complaints.push(Complaint::new(PAGE, *line, format!("{number} names no test"), remedy));
        }
    }
    for (name, line) in &page.tests {
        let there = if name.contains('/') {
            files.keys().any(|path| path.starts_with(name))
        } else {
            known.iter().any(|one| meet(name.as_bytes(), one.as_bytes()))
        };
        if !there {
            let remedy = "name one that there is, or write it";
            complaints.push(Complaint::new(PAGE, *line, format!("there is no test {name}"), remedy));
        }
    }
    complaints.extend(exceptions.loose(Rule::Numbers, &counts_of_numbers(files, sources)));
    complaints
}

impl<'a> Page<'a> {
    fn parse(text: &'a str) -> Self {
        let mut page = Self::default();
        // The guarantee whose section this is, and whether the last column of this table names tests.
        let (mut section, mut holds): (Option<String>, bool) = (None, false);
        for (line_number, line) in (1..).zip(text.lines()) {
            if line.starts_with('#') {
                section = page.heading(line, line_number);
                continue;
            }
            let cells: Vec<&str> = line.split(" | ").collect();
            holds = line.starts_with('|') && (holds || cells.last() == Some(&"held by |"));
            let held = cells.last().copied().filter(|_| holds).unwrap_or_default();
            let prose = line.strip_suffix(held).unwrap_or(line);
            let mut found: Vec<&str> = quoted(held).filter(|name| is_path(name) || is_name(name, 1)).collect();
            found.extend(quoted(prose).filter(|name| is_name(name, 3)));
            let number = cells.first().map_or("", |cell| cell.trim_start_matches("| "));
            if is_number(number) && holds {
                page.guarantees
                    .insert(number.to_owned(), (line_number, !found.is_empty()));
            } else if is_number(number) {
                page.others.insert(number.to_owned());
            } else if let Some((_, tested)) = section.as_ref().and_then(|number| page.guarantees.get_mut(number)) {
                *tested |= !found.is_empty();
            }
            page.tests.extend(found.into_iter().map(|name| (name, line_number)));
        }
        page
    }

    /// Takes a heading: `### B4: grants` begins a guarantee, which is returned, and `## 5. Backends` is the section S5.
    fn heading(&mut self, line: &str, line_number: usize) -> Option<String> {
        let heading = line.trim_start_matches('#').trim();
        if let Some((number, _)) = heading.split_once(". ") {
            self.others.insert(format!("S{number}"));
        }
        let (number, _) = heading.split_once(": ").filter(|(number, _)| is_number(number))?;
        self.guarantees.insert(number.to_owned(), (line_number, false));
        Some(number.to_owned())
    }

    fn has(&self, number: &str) -> bool {
        self.guarantees.contains_key(number) || self.others.contains(number)
    }

    /// Whether a word can only be the number of a guarantee: its letter is one that the page uses.
    fn is_citation(&self, word: &str) -> bool {
        let mut all = self.guarantees.keys().chain(&self.others);
        is_number(word) && all.any(|number| number.get(..1) == word.get(..1))
    }
}

fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// A capital letter and at most two digits.
fn is_number(word: &str) -> bool {
    word.strip_prefix(|first: char| first.is_ascii_uppercase())
        .is_some_and(|digits| (1..=2).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_path(name: &str) -> bool {
    name.contains('/') && !name.contains([' ', '{']) && !name.starts_with('/')
}

/// Whether a word is a test's name: it has at least so many underscores, or begins with the number of a guarantee.
fn is_name(word: &str, underscores: usize) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_*".contains(&byte);
    let cited = leading(word).next().is_some() || word.ends_with("_*");
    word.bytes().all(fits)
        && word.starts_with(|first: char| first.is_ascii_lowercase())
        && word.contains('_')
        && (cited || word.matches('_').count() >= underscores)
}

/// The numbers that a test's name begins with.
fn leading(name: &str) -> impl Iterator<Item = String> {
    let words = name.split('_').map(str::to_ascii_uppercase);
    words.take_while(|word| is_number(word))
}

/// Numbers that comments and names of tests cite, with their lines, and whether that is a comment.
fn citations(tokens: &[Token<'_>], page: &Page<'_>) -> Vec<(String, usize, bool)> {
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if token.is_comment() {
            let words = words(token.text).filter(|word| page.is_citation(word));
            found.extend(words.map(|word| (word.to_owned(), token.line, true)));
        } else if let Some(name) = test_name(tokens, at) {
            let numbers = leading(&name).filter(|number| page.is_citation(number));
            found.extend(numbers.map(|number| (number, token.line, false)));
        }
    }
    found
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_'))
}

/// A function's name, or a string that could be a case's.
fn test_name(tokens: &[Token<'_>], at: usize) -> Option<String> {
    let token = tokens.get(at)?;
    if token.is_string() {
        let name = filled(token.text.trim_matches('"'));
        return is_name(&name, 1).then_some(name);
    }
    let named = at > 0 && tokens.get(at - 1).is_some_and(|before| before.text == "fn");
    named.then(|| token.text.to_owned())
}

/// The names that tests may have in a file.
fn names(tokens: &[Token<'_>]) -> Vec<String> {
    (0..tokens.len()).filter_map(|at| test_name(tokens, at)).collect()
}

/// A template with a star for everything that is filled in.
fn filled(template: &str) -> String {
    let mut parts = template.split('{');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        name.push('*');
        name.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
    }
    name
}

/// Whether there is a name that both patterns fit.
fn meet(one: &[u8], other: &[u8]) -> bool {
    match (one, other) {
        ([b'*', rest @ ..], _) => meet(rest, other) || other.split_first().is_some_and(|(_, less)| meet(one, less)),
        (_, [b'*', ..]) => meet(other, one),
        ([a, one @ ..], [b, other @ ..]) => a == b && meet(one, other),
        ([], []) => true,
        _ => false,
    }
}

/// How often a user may see a number, by file.
pub(super) fn counts_of_numbers<'a>(files: &Files, sources: &'a [Source]) -> BTreeMap<&'a str, usize> {
    let page = Page::parse(files.get(PAGE).map_or("", String::as_str));
    counts(sources, |source| numbers(source, &source.tokens(), &page).len())
}

/// Numbers in string literals of what users see, with their lines.
fn numbers<'a>(source: &Source, tokens: &[Token<'a>], page: &Page<'_>) -> Vec<(&'a str, usize)> {
    if !source.path.starts_with(CODE[0]) {
        return Vec::new();
    }
    let tests = source.tests();
    let product = |token: &&Token<'_>| token.is_string() && !tests.iter().any(|range| range.contains(&token.line));
    let strings = tokens.iter().filter(product);
    let found = strings.flat_map(|token| words(token.text).map(move |word| (word, token.line)));
    found.filter(|(word, _)| page.has(word)).collect()
}

fn seen(source: &Source, tokens: &[Token<'_>], page: &Page<'_>, exceptions: &Exceptions) -> Vec<Complaint> {
    let found = numbers(source, tokens, page);
    let allowed = exceptions.allowed(Rule::Numbers, &source.path);
    if found.len() <= allowed {
        return Vec::new();
    }
    let complaint = |(number, line): &(&str, usize)| {
        let what = format!("a user may see the number {number}");
        Complaint::new(&source.path, *line, what, "say what it guarantees instead")
    };
    found.iter().map(complaint).collect()
}
