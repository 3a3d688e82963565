//! The programs that a command line or shell text runs: the first word of each simple command, and what it starts in
//! turn.

use std::collections::BTreeSet;

use tree_sitter::{Node, Parser};

use super::super::source::slice;

/// A word of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Known text.
    Text(String),
    /// The parameter of this number of the function that it is in.
    Parameter(usize),
    /// Something that this project itself builds, or text that is looked at elsewhere.
    Own,
    /// What the sources do not show where it is used.
    Unseen(String),
}

/// What a shell does itself.
const BUILTINS: &str = ". : [ alias bg break builtin cd command continue declare dirs echo eval exec exit export false \
    fg getopts hash \
    jobs kill let local mapfile printf pwd read readonly return set shift shopt source test times trap true type \
    typeset ulimit umask \
    unset wait";

/// Programs that run another: options that take the next word as their value, and words before the command.
const WRAPPERS: [(&str, &str, usize); 16] = [
    ("chpst", "-u -U -e", 0),
    ("chroot", "", 1),
    ("command", "", 0),
    ("env", "-u -C", 0),
    ("exec", "-a", 0),
    ("ionice", "-c -n", 0),
    ("nice", "-n", 0),
    ("nsenter", "--target -t", 0),
    (
        "setpriv",
        "--reuid --regid --groups --bounding-set --inh-caps --ambient-caps --securebits",
        0,
    ),
    ("setsid", "", 0),
    ("stdbuf", "-i -o -e", 0),
    ("sudo", "-u -g", 0),
    ("svlogd", "", usize::MAX),
    ("timeout", "-k -s", 1),
    ("unshare", "--propagation", 0),
    ("xargs", "-n -I -P -d", 0),
];
/// Those whose text is looked through.
const SHELLS: [&str; 3] = ["bash", "dash", "sh"];

/// Whether a word at the start of a list shows that the list is a command; `env` begins others, too.
pub(super) fn starts_command(word: &str) -> bool {
    SHELLS.contains(&word) || WRAPPERS.iter().any(|(name, ..)| *name == word && word != "env")
}

/// The programs that a command line runs, as words, where no shell does anything itself: `kill` is a program here.
pub(super) fn of_command(words: &[Word]) -> Vec<Word> {
    started(words, false)
}

fn started(words: &[Word], by_shell: bool) -> Vec<Word> {
    let Some((first, rest)) = words.split_first() else {
        return Vec::new();
    };
    let Word::Text(name) = first else {
        return vec![first.clone()];
    };
    // A variable, a wrapper's options that a function is given, or a script of the directory that one is in.
    if name.starts_with(['$', '-']) || (name.contains('/') && !name.starts_with('/')) {
        return vec![Word::Own];
    }
    let name = name.rsplit('/').next().unwrap_or(name);
    let mut found = Vec::new();
    if !by_shell || !BUILTINS.split_whitespace().any(|builtin| builtin == name) {
        found.push(Word::Text(name.to_owned()));
    }
    if let Some((_, valued, positional)) = WRAPPERS.iter().find(|(wrapper, ..)| *wrapper == name) {
        found.extend(of_command(inner(rest, valued, *positional)));
    } else if SHELLS.contains(&name) {
        let text = rest
            .iter()
            .position(|word| is_option(word, |option| option.ends_with('c')));
        match text.and_then(|place| rest.get(place + 1)) {
            Some(Word::Text(text)) => found.extend(programs(text).into_iter().map(Word::Text)),
            Some(Word::Unseen(text)) => found.push(Word::Unseen(text.clone())),
            Some(Word::Parameter(_) | Word::Own) | None => {}
        }
    } else if name == "busybox" {
        // Its applets are its own.
    } else if let Some(at) = rest
        .iter()
        .position(|word| is_option(word, |option| option.starts_with("-exec")))
    {
        found.extend(of_command(rest.get(at + 1..).unwrap_or_default()));
    } else if name == "ip" && rest.contains(&Word::Text("exec".to_owned())) {
        let at = rest
            .iter()
            .position(|word| *word == Word::Text("exec".to_owned()))
            .unwrap_or(0);
        found.extend(of_command(rest.get(at + 2..).unwrap_or_default()));
    } else if (name == "eval" || name == "trap")
        && let Some(Word::Text(text)) = rest.first()
    {
        found.extend(programs(text).into_iter().map(Word::Text));
    }
    found
}

fn is_option(word: &Word, of: impl Fn(&str) -> bool) -> bool {
    matches!(word, Word::Text(text) if text.starts_with('-') && !text.starts_with("--") && of(text))
}

/// What a wrapper runs.
fn inner<'a>(words: &'a [Word], valued: &str, positional: usize) -> &'a [Word] {
    let (mut at, mut positional) = (0, positional);
    while let Some(word) = words.get(at) {
        match word {
            Word::Text(text) if text == "--" => {
                at += 1;
                break;
            }
            Word::Text(text) if valued.split(' ').any(|option| option == text) => at += 1,
            Word::Text(text) if text.starts_with('-') || text.contains('=') => {}
            Word::Text(_) | Word::Parameter(_) | Word::Own | Word::Unseen(_) if positional > 0 => positional -= 1,
            Word::Text(_) | Word::Parameter(_) | Word::Own | Word::Unseen(_) => break,
        }
        at += 1;
    }
    words.get(at..).unwrap_or_default()
}

/// The programs that shell text runs, without functions of its own and what variables name.
pub(super) fn programs(text: &str) -> BTreeSet<String> {
    let (mut found, functions) = parts(text);
    found.retain(|name| !functions.contains(name));
    found
}

/// The commands of shell text, and the functions that it defines.
pub(super) fn parts(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut parser = Parser::new();
    let (mut found, mut functions) = (BTreeSet::new(), BTreeSet::new());
    if parser.set_language(&tree_sitter_bash::LANGUAGE.into()).is_ok()
        && let Some(tree) = parser.parse(text, None)
    {
        walk(tree.root_node(), text, &mut found, &mut functions);
    }
    (found, functions)
}

fn walk(node: Node<'_>, text: &str, found: &mut BTreeSet<String>, functions: &mut BTreeSet<String>) {
    match node.kind() {
        "command" => {
            let mut cursor = node.walk();
            let name = node.child_by_field_name("name").and_then(|name| name.named_child(0));
            let words: Vec<Word> = name
                .into_iter()
                .chain(node.children_by_field_name("argument", &mut cursor))
                .map(|word| word_of(word, text))
                .collect();
            for word in started(&words, true) {
                if let Word::Text(name) = word {
                    found.insert(name);
                }
            }
        }
        "function_definition" => {
            let name = node.child_by_field_name("name").map(|name| slice(name, text));
            functions.extend(name.map(str::to_owned));
        }
        _ => {}
    }
    let mut cursor = node.walk();
    for child in node.children(&mut cursor) {
        walk(child, text, found, functions);
    }
}

fn word_of(node: Node<'_>, text: &str) -> Word {
    let raw = slice(node, text);
    match node.kind() {
        "word" | "number" => Word::Text(raw.replace('\\', "")),
        "raw_string" => Word::Text(raw.trim_matches('\'').to_owned()),
        "string" => Word::Text(raw.trim_matches('"').to_owned()).known(),
        "concatenation" => Word::Text(raw.to_owned()).known(),
        _ => Word::Own,
    }
}

impl Word {
    /// Text with a variable in it is no name; as an option or shell text it still is what it is.
    fn known(self) -> Self {
        match self {
            Self::Text(text) if text.starts_with('$') => Self::Own,
            word @ (Self::Text(_) | Self::Parameter(_) | Self::Own | Self::Unseen(_)) => word,
        }
    }
}

#[test]
fn programs_are_what_commands_begin_with() {
    let text = "# not this\nset -e\na=1 first x | /usr/bin/second \"$(third)\" && ! fourth; own() { fifth; }\n\
        own \"$unknown\"\n\
        case $x in y) sixth ;; esac\nif seventh; then :; fi\ncat <<E\nnot $(eighth)\nE\n\"$program\" x\n\
        for i in not; do :; done\n";
    let found: Vec<String> = programs(text).into_iter().collect();
    assert_eq!(
        found,
        [
            "cat", "eighth", "fifth", "first", "fourth", "second", "seventh", "sixth", "third"
        ]
    );
}

#[test]
fn what_runs_others_is_looked_through() {
    let text = "exec setpriv --reuid 1 --clear-groups -- one\ntimeout -k 5 10 two\nenv A=b three\n\
        unshare --mount sh -euc 'four; five \"$1\"' sh x\n\
        ip netns exec n six\ntrap 'seven' EXIT\nfind . -exec eight {} +\nnsenter --target 1 --net -- \"$@\"\n\
        umask 077; timeout 5 kill 1\n";
    let found = programs(text);
    for name in ["one", "two", "three", "four", "five", "six", "seven", "eight"] {
        assert!(found.contains(name), "{name} of {found:?}");
    }
    // What a shell does itself, another program cannot.
    assert!(found.contains("kill") && !found.contains("umask"), "{found:?}");
    assert!(
        !found.contains("1") && !found.contains("n") && !found.contains("10"),
        "{found:?}"
    );
}
