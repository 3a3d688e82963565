//! A Rust file, parsed once for every check: its tokens, and which of its lines are tests.

use std::ops::RangeInclusive;

use anyhow::{Context as _, Result};
use tree_sitter::{Node, Parser, Tree};

/// Macros whose arguments are expressions.
const CALLED: [&str; 7] = ["ensure", "assert", "assert_eq", "bail", "vec", "eprintln", "println"];
/// How an attribute of something that is built for tests only begins.
const TESTED: [&str; 3] = ["#[test]", "#[cfg(test)", "#[cfg(all(test"];

/// A file, parsed.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) tree: Tree,
}

/// What the grammar does not take apart any further, literals and comments included.
pub(crate) struct Token<'a> {
    pub(crate) kind: &'a str,
    pub(crate) text: &'a str,
    /// Where it begins, counted from 1.
    pub(crate) line: usize,
}

impl Token<'_> {
    pub(crate) fn is_comment(&self) -> bool {
        self.kind.ends_with("_comment")
    }

    pub(crate) fn is_string(&self) -> bool {
        self.kind.ends_with("string_literal")
    }
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Result<Self> {
        let mut parser = Parser::new();
        parser.set_language(&tree_sitter_rust::LANGUAGE.into())?;
        // What stands in a macro is only tokens to the grammar; with a blank in place of the `!` most macros are calls.
        // Nothing moves.
        let mut text = text.to_owned();
        for name in CALLED {
            text = text
                .replace(&format!("{name}!("), &format!("{name} ("))
                .replace(&format!("{name}!["), &format!("{name} ["));
        }
        let tree = parser.parse(&text, None).with_context(|| format!("parse {path}"))?;
        Ok(Self {
            path: path.to_owned(),
            text,
            tree,
        })
    }

    /// All tokens in their order.
    pub(crate) fn tokens(&self) -> Vec<Token<'_>> {
        let mut tokens = Vec::new();
        self.collect(self.tree.root_node(), &mut tokens);
        tokens
    }

    fn collect<'a>(&'a self, node: Node<'a>, tokens: &mut Vec<Token<'a>>) {
        let kind = node.kind();
        if node.child_count() == 0 || kind.ends_with("_comment") || kind.ends_with("string_literal") {
            tokens.push(Token {
                kind,
                text: slice(node, &self.text),
                line: node.start_position().row + 1,
            });
            return;
        }
        let mut cursor = node.walk();
        for child in node.children(&mut cursor) {
            self.collect(child, tokens);
        }
    }

    /// The lines of items that are built for tests only, with their attributes.
    pub(crate) fn tests(&self) -> Vec<RangeInclusive<usize>> {
        if is_test(&self.path) {
            return vec![1..=usize::MAX];
        }
        let mut ranges = Vec::new();
        self.collect_tests(self.tree.root_node(), &mut ranges);
        ranges
    }

    fn collect_tests(&self, node: Node<'_>, ranges: &mut Vec<RangeInclusive<usize>>) {
        let mut cursor = node.walk();
        // The first line of the attributes before an item, where one of them is about tests.
        let mut first = None;
        for child in node.children(&mut cursor) {
            if child.kind() == "attribute_item" {
                let text = slice(child, &self.text);
                if TESTED.iter().any(|start| text.starts_with(start)) {
                    first = first.or(Some(child.start_position().row + 1));
                }
            } else if child.kind().ends_with("_comment") {
                // Between attributes and their item.
            } else if let Some(first) = first.take() {
                ranges.push(first..=child.end_position().row + 1);
            } else {
                self.collect_tests(child, ranges);
            }
        }
    }
}

/// Whether a file is built for tests only.
pub(crate) fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The text of a node.
pub(crate) fn slice<'a>(node: Node<'_>, text: &'a str) -> &'a str {
    text.get(node.byte_range()).unwrap_or_default()
}
