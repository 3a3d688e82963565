//! What a string literal or a template stands for.

use tree_sitter::Node;

use super::{super::source::slice, rust::children};

/// The value of a string literal.
pub(super) fn literal(node: Node<'_>, text: &str) -> String {
    let mut value = String::new();
    for part in children(node) {
        let part_text = slice(part, text);
        match (part.kind(), part_text) {
            ("escape_sequence", "\\n") => value.push('\n'),
            ("escape_sequence", "\\t") => value.push('\t'),
            // A line that goes on.
            ("escape_sequence", escape) if escape.starts_with("\\\n") => value.push(' '),
            ("escape_sequence", escape) => value.push_str(escape.trim_start_matches('\\')),
            _ => value.push_str(part_text),
        }
    }
    value
}

/// A template's text, with a variable in place of what is filled in.
pub(super) fn filled(template: &str) -> String {
    let (mut text, mut inside) = (String::new(), false);
    for c in template.replace("{{", "\u{1}").replace("}}", "\u{2}").chars() {
        match c {
            '{' => inside = true,
            '}' => {
                inside = false;
                text.push_str("$x");
            }
            '\u{1}' => text.push('{'),
            '\u{2}' => text.push('}'),
            c if !inside => text.push(c),
            _ => {}
        }
    }
    text
}
