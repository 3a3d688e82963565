//! Each rule over a small tree that breaks it, and over one that does not.

use std::{fs, process::Command};

use anyhow::{Result, ensure};

use super::{check, files, shape::WIDTH, sources};

/// A page with one guarantee, an aim and a section.
const GUARANTEES: &str = "\
## Decision

| | guarantee | held by |
| --- | --- | --- |
| D1 | What. | `d1_*`, `holds_without_a_number` |

| P1 | An aim of `some_other_word` alone. |

## 5. Backends

`d1_in_some_way` holds D1, as `enforcer/src/` does.
";

/// What is wrong in a tree, given by paths and texts.
fn complaints(tree: &[(&str, &str)]) -> Result<Vec<String>> {
    let files = tree
        .iter()
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect();
    let complaints = check(&files, &sources(&files)?)?;
    Ok(complaints.iter().map(ToString::to_string).collect())
}

/// A tree of modules in the order a, b, c, where b must not import `a::secret`.
fn rooms(b: &str, exceptions: &str) -> Result<Vec<String>> {
    let page = "| `a.rs` |\n| `b.rs` |\n| `c.rs` |\n\n### From the ground up\n\n1. `a`\n2. `b`, never `a::secret`\n\
        3. `c`\n\n## Next\n";
    complaints(&[
        ("enforcer/docs/architecture.md", page),
        ("enforcer/src/a.rs", "//! A.\n"),
        ("enforcer/src/b/part.rs", b),
        ("enforcer/src/c.rs", "//! C.\nuse crate::b;\n"),
        ("enforcer/src/main.rs", "//! All.\nuse crate::c;\n"),
        ("xtask/tidy.toml", exceptions),
    ])
}

/// A tree with a page of guarantees, code and a case.
fn guaranteed(page: &str, code: &str, case: &str) -> Result<Vec<String>> {
    let rooms = "| `a.rs` |\n\n### From the ground up\n\n1. `a`\n";
    complaints(&[
        ("enforcer/docs/architecture.md", rooms),
        ("enforcer/docs/guarantees.md", page),
        ("enforcer/src/a.rs", code),
        ("tests/src/cases/a.rs", case),
    ])
}

#[test]
fn a_file_opens_with_what_it_is() -> Result<()> {
    let found = complaints(&[("a.rs", "//! A.\n"), ("b.rs", "// B.\n")])?;
    assert_eq!(
        found,
        ["b.rs:1: does not open with //!; say there what the file is, in a line or three"]
    );
    Ok(())
}

#[test]
fn lines_end_at_a_column() -> Result<()> {
    // Columns are characters.
    let fits = "ä".repeat(WIDTH - 5);
    let wide = format!("//! A.\n// {fits} b\n// {fits} bc\n");
    let found = complaints(&[("a.rs", &wide)])?;
    assert_eq!(found, ["a.rs:3: 121 columns; break it before column 121"]);
    Ok(())
}

#[test]
fn what_cannot_be_broken_may_be_wider() -> Result<()> {
    let word = "x".repeat(WIDTH);
    let text = format!("//! A.\n// https://{word}\nconst A: &str = r\"{word}\n{word} b\";\n");
    assert_eq!(complaints(&[("a.rs", &text)])?, [""; 0]);
    Ok(())
}

#[test]
fn ceilings_only_become_lower() -> Result<()> {
    let wide = |count: usize| format!("//! A.\n{}", format!("// {} b\n", "x".repeat(WIDTH)).repeat(count));
    let ratchet = |count: usize, ceiling: usize| {
        complaints(&[
            ("a.rs", &wide(count)),
            ("xtask/tidy.toml", &format!("[length]\n[wide]\n\"a.rs\" = {ceiling}\n")),
        ])
    };
    assert_eq!(ratchet(10, 10)?, [""; 0]);
    assert_eq!(ratchet(8, 10)?, [""; 0]);
    assert_eq!(
        ratchet(2, 1)?,
        [
            "a.rs:2: 125 columns, one of 2 such lines, of which 1 are allowed; break it before column 121",
            "a.rs:3: 125 columns, one of 2 such lines, of which 1 are allowed; break it before column 121",
        ]
    );
    assert_eq!(
        ratchet(7, 10)?,
        ["xtask/tidy.toml:3: [wide] has \"a.rs\" = 10, and there are 7; write \"a.rs\" = 7"]
    );
    assert_eq!(
        ratchet(0, 1)?,
        ["xtask/tidy.toml:3: [wide] has \"a.rs\" = 1, and there are 0; remove this line"]
    );
    Ok(())
}

#[test]
fn files_are_short_without_their_tests() -> Result<()> {
    let lines = |product: usize| {
        let tests = format!("/// Some.\n#[cfg(test)]\nmod tests {{\n{}}}\n", "// b\n".repeat(300));
        format!("//! A.\n{}{tests}", "// a\n".repeat(product))
    };
    assert_eq!(complaints(&[("a.rs", &lines(498))])?, [""; 0]);
    assert_eq!(complaints(&[("a/tests.rs", &lines(600))])?, [""; 0]);
    assert_eq!(
        complaints(&[("a.rs", &lines(500))])?,
        ["a.rs:1: 502 lines without tests, of which 500 are allowed; give its second subject a file of its own"]
    );
    let ceiling =
        |product: usize, ceiling: &str| complaints(&[("a.rs", &lines(product)), ("xtask/tidy.toml", ceiling)]);
    assert_eq!(ceiling(598, "[length]\n\"a.rs\" = 600\n")?, [""; 0]);
    assert_eq!(
        ceiling(400, "[length]\n\"a.rs\" = 600\n")?,
        ["xtask/tidy.toml:2: [length] has \"a.rs\" = 600, and there are 402; remove this line"]
    );
    Ok(())
}

#[test]
fn rooms_import_what_is_below_them() -> Result<()> {
    assert_eq!(
        rooms(
            "//! B.\nuse crate::{a, b::{self, part}};\nuse super::super::a::two;\n",
            ""
        )?,
        [""; 0]
    );
    assert_eq!(
        rooms("//! B.\n#[cfg(test)]\nmod tests {\n    use crate::c;\n}\n", "")?,
        [""; 0]
    );
    let up = "enforcer/src/b/part.rs:4: b imports c, which stands above it; \
        move what both use into a module below both, or this into one above";
    assert_eq!(
        rooms(
            "//! B.\nuse crate::{\n    a::{one, two},\n    c::{self, three},\n};\n",
            ""
        )?,
        [up]
    );
    assert_eq!(rooms("//! B.\n\nfn one() {\n    crate::c::two();\n}\n", "")?, [up]);
    assert_eq!(rooms("//! B.\n\n\nuse super::super::c;\n", "")?, [up]);
    assert_eq!(
        rooms("//! B.\nuse crate::a::{open, secret::thing};\n", "")?,
        [
            "enforcer/src/b/part.rs:2: b imports a::secret, which its line in the list of modules forbids; \
            move what both use into a module below both, or this into one above"
        ]
    );
    Ok(())
}

#[test]
fn an_exception_goes_with_its_arrow() -> Result<()> {
    let exception = "[[arrows]]\nfrom = \"b\"\nto = \"c\"\nwhy = \"because\"\n";
    assert_eq!(rooms("//! B.\nuse crate::c;\n", exception)?, [""; 0]);
    assert_eq!(
        rooms("//! B.\nuse crate::a;\n", exception)?,
        ["xtask/tidy.toml:2: b does not import c any more; remove this exception"]
    );
    Ok(())
}

#[test]
fn every_room_has_its_place() -> Result<()> {
    let page = "| `b.rs` |\n\n### From the ground up\n\n1. `a`\n2. `b`\n3. `c`\n";
    let found = complaints(&[
        ("enforcer/docs/architecture.md", page),
        ("enforcer/src/a.rs", "//! A.\n"),
        ("enforcer/src/b.rs", "//! B.\n"),
        ("enforcer/src/d/part.rs", "//! D.\n"),
    ])?;
    assert_eq!(
        found,
        [
            "enforcer/docs/architecture.md:1: the table of modules has no a; write a line that begins with \"| `a.rs` \
             |\"",
            "enforcer/src/d/part.rs:1: module d is not in the list; \
                put it where it belongs below \"### From the ground up\" in enforcer/docs/architecture.md",
            "enforcer/docs/architecture.md:7: there is no module c; remove this line",
        ]
    );
    Ok(())
}

#[test]
fn guarantees_are_cited_and_tested() -> Result<()> {
    let (code, case) = (
        "//! A (D1, P1).\n",
        "//! Cases.\nfn d1_in_some_way() {}\nfn holds_without_a_number() {}\n",
    );
    assert_eq!(guaranteed(GUARANTEES, code, case)?, [""; 0]);
    // By the string that a case's name is made from.
    let named = "//! Cases.\nfn f() { case(&format!(\"d1_in_{way:?}\")); case(\"holds_without_a_number\"); }\n";
    assert_eq!(guaranteed(GUARANTEES, code, named)?, [""; 0]);
    assert_eq!(
        guaranteed(GUARANTEES, "//! A.\n", case)?,
        ["enforcer/docs/guarantees.md:5: no code cites D1; \
            cite D1 in a comment where the code holds it, below enforcer/src/, enforcer/client/src/, \
            enforcer-ebpf/src/"]
    );
    assert_eq!(
        guaranteed(GUARANTEES, "//! A (D1).\n// D2 and U8.\n", case)?,
        ["enforcer/src/a.rs:2: there is no guarantee D2; cite one of enforcer/docs/guarantees.md, or write it there"]
    );
    assert_eq!(
        guaranteed(GUARANTEES, code, &format!("{case}fn d1_d3_both() {{}}\n"))?,
        [
            "tests/src/cases/a.rs:4: there is no guarantee D3; cite one of enforcer/docs/guarantees.md, or write it \
             there"
        ]
    );
    Ok(())
}

#[test]
fn tests_that_guarantees_name_are_there() -> Result<()> {
    let code = "//! A (D1).\n";
    assert_eq!(
        guaranteed(
            GUARANTEES,
            code,
            "//! Cases.\nfn d1_else() {}\nfn holds_without_a_number() {}\n"
        )?,
        ["enforcer/docs/guarantees.md:11: there is no test d1_in_some_way; name one that there is, or write it"]
    );
    assert_eq!(
        guaranteed(
            "| | guarantee | held by |\n| D1 | What. | not simulated |\n\n### B1: more\n\n`b1_*`\n",
            "//! A (D1, B1).\n",
            "//! Cases.\nfn b1_x() {}\n"
        )?,
        ["enforcer/docs/guarantees.md:2: D1 names no test; name the test in backticks, or the file of the tests"]
    );
    // In a column of tests a name need not be long, elsewhere it must.
    assert_eq!(
        guaranteed(
            "| what | held by |\n| --- | --- |\n| `no_test` | `bears_all`, `a/b.rs` |\n\n`no_test`\n",
            "//! A.\n",
            "//! Cases.\n"
        )?,
        [
            "enforcer/docs/guarantees.md:3: there is no test bears_all; name one that there is, or write it",
            "enforcer/docs/guarantees.md:3: there is no test a/b.rs; name one that there is, or write it",
        ]
    );
    Ok(())
}

#[test]
fn users_see_no_numbers() -> Result<()> {
    let code = "//! A (D1).\nconst A: &str = \"denied (D1)\";\n#[test]\nfn b() { c(\"D1\"); }\n";
    let case = "//! Cases.\nfn d1_in_some_way() { d(\"D1\"); }\nfn holds_without_a_number() {}\n";
    assert_eq!(
        guaranteed(GUARANTEES, code, case)?,
        ["enforcer/src/a.rs:2: a user may see the number D1; say what it guarantees instead"]
    );
    Ok(())
}

#[test]
fn files_are_those_that_git_would_take() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let git = Command::new("git")
        .args(["init", "--quiet"])
        .current_dir(dir.path())
        .status()?;
    ensure!(git.success(), "git init failed");
    fs::write(dir.path().join(".gitignore"), "target\n")?;
    fs::create_dir(dir.path().join("target"))?;
    fs::write(dir.path().join("target/made.rs"), "")?;
    fs::write(dir.path().join("a.rs"), "fn a() {}\n")?;
    let files = files(dir.path())?;
    assert_eq!(files.keys().collect::<Vec<_>>(), [".gitignore", "a.rs"]);
    let found = check(&files, &sources(&files)?)?;
    assert_eq!(
        found.first().map(|one| (one.path.as_str(), one.line)),
        Some(("a.rs", 1))
    );
    Ok(())
}
