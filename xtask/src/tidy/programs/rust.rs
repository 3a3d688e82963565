//! The programs that Rust code runs: what reaches `Command::new`, directly or through functions that hand a parameter
//! on to it, and what such programs run in turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use tree_sitter::Node;

use super::{
    super::source::{Source, slice},
    shell::{Word, of_command, starts_command},
    text::{filled, literal},
};

/// What names something that this project builds, the cargo that runs us, a program by another name, or a command line
/// that is looked through where it is made.
const OWN: [&str; 13] = [
    "binary(",
    "built(",
    "called(",
    "cli.command",
    "copy_binary(",
    "current_exe(",
    "env!(",
    "get_program(",
    "path(\"enforcer\")",
    "self.prefix",
    "target_dir(",
    "var_os(\"CARGO\")",
    "whole_binary(",
];

/// Methods of the scratch root that take shell text.
const SHELL: [&str; 2] = ["scratch.read", "scratch.run"];

/// What a source runs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Found {
    Program(String),
    /// Where it cannot be seen which program runs.
    Unseen(String),
}

/// Functions, by name and whether they are methods, and which parameter of each reaches a command.
type Spawners = BTreeSet<(String, bool, usize)>;

struct Function<'a> {
    source: &'a Source,
    name: &'a str,
    method: bool,
    parameters: Vec<&'a str>,
    body: Node<'a>,
}

/// What each of the sources runs, by path.
pub(super) fn programs(sources: &[&Source]) -> BTreeMap<String, BTreeSet<Found>> {
    let mut functions = Vec::new();
    let mut constants = BTreeMap::new();
    for &source in sources {
        collect(source, source.tree.root_node(), &mut functions, &mut constants);
    }
    let mut spawners = Spawners::new();
    loop {
        let known = spawners.len();
        let mut all: BTreeMap<String, BTreeSet<Found>> = BTreeMap::new();
        for function in &functions {
            let found = all.entry(function.source.path.clone()).or_default();
            let mut look = Look {
                function,
                constants: &constants,
                functions: &functions,
                words: Vec::new(),
            };
            look.walk(function.body, &mut spawners);
            for word in look.words {
                match word {
                    Word::Text(name) => {
                        found.insert(Found::Program(name));
                    }
                    Word::Parameter(number) => {
                        spawners.insert((function.name.to_owned(), function.method, number));
                    }
                    Word::Own => {}
                    Word::Unseen(text) => {
                        found.insert(Found::Unseen(format!("in `{}`: {text}", function.name)));
                    }
                }
            }
        }
        if spawners.len() == known {
            return all;
        }
    }
}

/// Constants are told apart by file, then by name alone.
type Constants<'a> = BTreeMap<(&'a str, &'a str), (&'a Source, Node<'a>)>;

fn collect<'a>(source: &'a Source, node: Node<'a>, functions: &mut Vec<Function<'a>>, constants: &mut Constants<'a>) {
    let name = node
        .child_by_field_name("name")
        .map_or("", |name| slice(name, &source.text));
    match node.kind() {
        "function_item" => {
            if let (Some(list), Some(body)) = (node.child_by_field_name("parameters"), node.child_by_field_name("body"))
            {
                let mut cursor = list.walk();
                let all: Vec<Node<'a>> = list.named_children(&mut cursor).collect();
                functions.push(Function {
                    source,
                    name,
                    method: all.iter().any(|one| one.kind() == "self_parameter"),
                    parameters: all
                        .iter()
                        .filter_map(|one| one.child_by_field_name("pattern"))
                        .map(|pattern| slice(pattern, &source.text).trim_start_matches("mut "))
                        .collect(),
                    body,
                });
            }
        }
        "const_item" | "static_item" => {
            if let Some(value) = node.child_by_field_name("value") {
                constants.insert((&source.path, name), (source, value));
                constants.entry(("", name)).or_insert((source, value));
            }
        }
        _ => {}
    }
    let mut cursor = node.walk();
    for child in node.children(&mut cursor) {
        collect(source, child, functions, constants);
    }
}

struct Look<'a> {
    function: &'a Function<'a>,
    constants: &'a Constants<'a>,
    functions: &'a [Function<'a>],
    words: Vec<Word>,
}

impl<'a> Look<'a> {
    fn text(&self, node: Node<'_>) -> &'a str {
        slice(node, &self.function.source.text)
    }

    fn walk(&mut self, node: Node<'a>, spawners: &mut Spawners) {
        // A function within has its own turn.
        if node.kind() == "function_item" {
            return;
        }
        if node.kind() == "call_expression" {
            let words = self.command(node, spawners);
            self.words.extend(of_command(&words));
        }
        // Lists of words are handed around before they become a command.
        if node.kind() == "array_expression" {
            let words: Vec<Word> = children(node)
                .into_iter()
                .flat_map(|item| self.resolve(item, 0))
                .collect();
            if matches!(words.first(), Some(Word::Text(first)) if starts_command(first)) {
                self.words.extend(of_command(&words));
            }
        }
        for child in children(node) {
            self.walk(child, spawners);
        }
    }

    /// The command line that a call begins: its program, and what `arg` and `args` add to it.
    fn command(&self, call: Node<'a>, spawners: &Spawners) -> Vec<Word> {
        let (Some(callee), Some(arguments)) = (
            call.child_by_field_name("function"),
            call.child_by_field_name("arguments"),
        ) else {
            return Vec::new();
        };
        let field = callee.child_by_field_name("field").map(|field| self.text(field));
        let path = self.text(callee);
        if SHELL.contains(&path) {
            let text = children(arguments).into_iter().flat_map(|text| self.resolve(text, 0));
            return ["sh", "-c"]
                .map(|word| Word::Text(word.to_owned()))
                .into_iter()
                .chain(text)
                .collect();
        }
        let place = if path.ends_with("Command::new") {
            Some(0)
        } else {
            let name = field.unwrap_or_else(|| path.rsplit("::").next().unwrap_or(path));
            // `fs::read` is none of ours.
            let foreign = field.is_none() && ["fs::", "io::"].iter().any(|start| path.starts_with(start));
            let mut of_name = spawners
                .iter()
                .filter(|(spawner, method, _)| spawner == name && *method == field.is_some() && !foreign);
            of_name.next().map(|(.., place)| *place)
        };
        let Some(program) = place.and_then(|place| children(arguments).into_iter().nth(place)) else {
            return Vec::new();
        };
        let programs = self.resolve(program, 0);
        let mut rest = Vec::new();
        // `read("cc", &["-v"])`: the rest of the command line is the next argument.
        if field.is_none() || !path.ends_with("Command::new") {
            rest.extend(
                children(arguments)
                    .into_iter()
                    .skip(place.unwrap_or(0) + 1)
                    .flat_map(|more| self.resolve(more, 0)),
            );
        }
        let mut last = call;
        while let Some(next) = last
            .parent()
            .filter(|parent| parent.kind() == "field_expression")
            .and_then(|field| field.parent())
        {
            self.add(next, &mut rest);
            last = next;
        }
        let bound = last
            .parent()
            .filter(|parent| parent.kind() == "let_declaration" || parent.kind() == "try_expression");
        let bound = bound.map(|parent| {
            if parent.kind() == "try_expression" {
                parent.parent().unwrap_or(parent)
            } else {
                parent
            }
        });
        if let Some(pattern) = bound.and_then(|bound| bound.child_by_field_name("pattern")) {
            let name = self.text(pattern).trim_start_matches("mut ");
            let again = find(self.function.body, &|node| {
                node.kind() == "let_declaration"
                    && node.start_byte() > last.end_byte()
                    && node
                        .child_by_field_name("pattern")
                        .is_some_and(|of| self.text(of).trim_start_matches("mut ") == name)
            });
            let range = last.end_byte()..again.map_or(usize::MAX, |again| again.start_byte());
            self.later(self.function.body, name, &range, &mut rest);
        }
        // Whichever of the programs it is, it has the same command line.
        match programs.as_slice() {
            [one] => std::iter::once(one.clone()).chain(rest).collect(),
            several => several.to_vec(),
        }
    }

    /// What calls on a variable add to its command line.
    fn later(&self, node: Node<'a>, variable: &str, range: &Range<usize>, words: &mut Vec<Word>) {
        if node.kind() == "call_expression" && range.contains(&node.start_byte()) {
            let mut receiver = node;
            while let Some(value) = receiver
                .child_by_field_name("function")
                .and_then(|of| of.child_by_field_name("value"))
            {
                receiver = value;
            }
            if receiver.kind() == "identifier" && self.text(receiver) == variable {
                let mut calls = Vec::new();
                let mut call = node;
                while call.kind() == "call_expression" {
                    calls.push(call);
                    let Some(value) = call
                        .child_by_field_name("function")
                        .and_then(|of| of.child_by_field_name("value"))
                    else {
                        break;
                    };
                    call = value;
                }
                for call in calls.into_iter().rev() {
                    self.add(call, words);
                }
                return;
            }
        }
        for child in children(node) {
            self.later(child, variable, range, words);
        }
    }

    fn add(&self, call: Node<'a>, words: &mut Vec<Word>) {
        let field = call
            .child_by_field_name("function")
            .and_then(|of| of.child_by_field_name("field"));
        if matches!(field.map(|field| self.text(field)), Some("arg" | "args"))
            && let Some(arguments) = call.child_by_field_name("arguments")
        {
            words.extend(
                children(arguments)
                    .into_iter()
                    .flat_map(|argument| self.resolve(argument, 0)),
            );
        }
    }

    /// What an expression comes to, as far as the sources show it.
    fn resolve(&self, node: Node<'a>, depth: usize) -> Vec<Word> {
        let text = self.text(node);
        let unseen = || vec![Word::Unseen(text.split_whitespace().collect::<Vec<_>>().join(" "))];
        if depth > 8 {
            return unseen();
        }
        if OWN.iter().any(|own| text.contains(own)) {
            return vec![Word::Own];
        }
        let deeper = |node| self.resolve(node, depth + 1);
        let field = |name| node.child_by_field_name(name);
        match node.kind() {
            "string_literal" | "raw_string_literal" => vec![Word::Text(literal(node, &self.function.source.text))],
            "reference_expression" | "try_expression" | "parenthesized_expression" => {
                children(node).last().map_or_else(unseen, |inner| deeper(*inner))
            }
            "array_expression" => children(node).into_iter().flat_map(deeper).collect(),
            "identifier" => self.named(text, depth).unwrap_or_else(unseen),
            "macro_invocation" if text.starts_with("format!") => {
                let template = field_tokens(node).and_then(|tokens| children(tokens).into_iter().next());
                template.map_or_else(unseen, |template| {
                    vec![Word::Text(filled(&literal(template, &self.function.source.text)))]
                })
            }
            "macro_invocation" if text.starts_with("include_str!") => vec![Word::Own],
            "call_expression" => {
                let callee = field("function");
                let value = callee.and_then(|callee| callee.child_by_field_name("value"));
                let first = field("arguments").and_then(|arguments| children(arguments).into_iter().next());
                match (value, first) {
                    // `x.as_ref()`, `x.unwrap_or_else(|| "y".into())`
                    (Some(value), None) => deeper(value),
                    (Some(value), Some(other)) if self.text(callee.unwrap_or(node)).contains("unwrap_or") => {
                        deeper(value).into_iter().chain(deeper(other)).collect()
                    }
                    (None, Some(first))
                        if ["Path::new", "PathBuf::from", "Some"]
                            .iter()
                            .any(|of| text.starts_with(of)) =>
                    {
                        deeper(first)
                    }
                    (Some(value), Some(_)) if self.text(callee.unwrap_or(node)).ends_with(".replace") => deeper(value),
                    (None, None) => self
                        .returned(callee.map_or("", |callee| self.text(callee)), depth)
                        .unwrap_or_else(unseen),
                    (Some(_) | None, _) => unseen(),
                }
            }
            "if_expression" => [field("consequence"), field("alternative")]
                .into_iter()
                .flatten()
                .flat_map(deeper)
                .collect(),
            "block" | "else_clause" => children(node).last().map_or_else(unseen, |value| deeper(*value)),
            "match_expression" => field("body")
                .map(children)
                .unwrap_or_default()
                .into_iter()
                .filter_map(|arm| arm.child_by_field_name("value"))
                .flat_map(deeper)
                .collect(),
            _ => unseen(),
        }
    }

    /// A parameter, a variable or a constant.
    fn named(&self, name: &str, depth: usize) -> Option<Vec<Word>> {
        if let Some(value) = self.variable(self.function.body, name) {
            return Some(self.resolve(value, depth + 1));
        }
        if let Some(number) = self.function.parameters.iter().position(|parameter| *parameter == name) {
            return Some(vec![Word::Parameter(number)]);
        }
        if let Some(values) = self.in_loop(name, depth).or_else(|| self.in_closure(name, depth)) {
            return Some(values);
        }
        let of_file = self.constants.get(&(self.function.source.path.as_str(), name));
        let (source, value) = of_file.or_else(|| self.constants.get(&("", name)))?;
        let function = Function {
            source,
            name: "",
            method: false,
            parameters: Vec::new(),
            body: *value,
        };
        let look = Look {
            function: &function,
            constants: self.constants,
            functions: self.functions,
            words: Vec::new(),
        };
        Some(look.resolve(*value, depth + 1))
    }

    /// What a function without parameters looks for, as the names of one program stand in a list.
    fn returned(&self, name: &str, depth: usize) -> Option<Vec<Word>> {
        let function = self.functions.iter().find(|function| function.name == name)?;
        let list = find(function.body, &|node| node.kind() == "array_expression")?;
        let look = Look {
            function,
            constants: self.constants,
            functions: self.functions,
            words: Vec::new(),
        };
        Some(look.resolve(list, depth + 1))
    }

    /// What a variable is in each turn of a loop over a list of tuples.
    fn in_loop(&self, name: &str, depth: usize) -> Option<Vec<Word>> {
        let binds = |node: Node<'_>| {
            node.kind() == "for_expression"
                && node
                    .child_by_field_name("pattern")
                    .is_some_and(|pattern| children(pattern).iter().any(|one| self.text(*one) == name))
        };
        let of = find(self.function.body, &binds)?;
        let place = children(of.child_by_field_name("pattern")?)
            .iter()
            .position(|one| self.text(*one) == name)?;
        let value = of.child_by_field_name("value")?;
        let list = self.variable(self.function.body, self.text(value)).unwrap_or(value);
        let tuples = children(list).into_iter();
        let values = tuples.filter_map(|tuple| children(tuple).into_iter().nth(place));
        Some(values.flat_map(|value| self.resolve(value, depth + 1)).collect())
    }

    /// What a closure's parameter is, of the list that the closure is called for.
    fn in_closure(&self, name: &str, depth: usize) -> Option<Vec<Word>> {
        let takes = |node: Node<'_>| {
            node.kind() == "closure_expression"
                && node
                    .child_by_field_name("parameters")
                    .is_some_and(|parameters| children(parameters).iter().any(|one| self.text(*one) == name))
        };
        let closure = find(self.function.body, &takes)?;
        let call = closure.parent()?.parent()?;
        let list = call.child_by_field_name("function")?.child_by_field_name("value")?;
        Some(self.resolve(list, depth + 1))
    }

    /// What is bound to a name, alone or as part of a pattern.
    fn variable(&self, node: Node<'a>, name: &str) -> Option<Node<'a>> {
        let is_name = |part: Node<'_>| part.kind() == "identifier" && self.text(part) == name;
        if node.kind() == "let_declaration"
            && node
                .child_by_field_name("pattern")
                .is_some_and(|pattern| find(pattern, &is_name).is_some())
        {
            return node.child_by_field_name("value");
        }
        children(node).into_iter().find_map(|child| self.variable(child, name))
    }
}

pub(super) fn children(node: Node<'_>) -> Vec<Node<'_>> {
    let mut cursor = node.walk();
    let all = node.named_children(&mut cursor);
    all.filter(|child| !child.kind().ends_with("comment")).collect()
}

fn find<'a>(node: Node<'a>, is: &impl Fn(Node<'_>) -> bool) -> Option<Node<'a>> {
    if is(node) {
        return Some(node);
    }
    children(node).into_iter().find_map(|child| find(child, is))
}

fn field_tokens(node: Node<'_>) -> Option<Node<'_>> {
    children(node).into_iter().find(|child| child.kind() == "token_tree")
}
