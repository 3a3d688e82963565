//! A report as a person reads it, at three in the morning perhaps.

use std::fmt::Write as _;

use super::{Report, Weight};

/// Text is broken before this column, so that it stays readable in a narrow terminal.
const WIDTH: usize = 110;

impl Report {
    /// As a person reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        self.render_host(&mut text);
        self.render_features(&mut text);
        self.render_choice(&mut text);
        self.render_findings(&mut text);
        text
    }

    fn render_host(&self, text: &mut String) {
        let host = &self.host;
        let mut line = |key: &str, value: &str| text.push_str(&format!("  {key:<10}{value}\n"));
        match &host.root {
            Some(root) => line("image", &format!("{root}, looked at, not run")),
            None => line("host", "this one"),
        }
        line("kernel", &host.kernel);
        line("config", &host.config);
        if host.root.is_none() {
            line("cgroup", host.cgroup.as_deref().unwrap_or("no cgroup v2 is mounted"));
            line("in force", host.in_force.as_deref().unwrap_or("nothing"));
            let daemon = host
                .daemon
                .map_or_else(|| "does not answer".to_owned(), |pid| format!("pid {pid}"));
            line("daemon", &daemon);
        }
        text.insert_str(0, "HOST\n");
    }

    fn render_features(&self, text: &mut String) {
        text.push_str("\nBACKENDS\n");
        for (of, name) in [("ebpf", "ebpf"), ("nftables", "nftables"), ("either", "both")] {
            let all: Vec<_> = self.features.iter().filter(|feature| feature.of == of).collect();
            let there = all.iter().filter(|feature| feature.state == "supported").count();
            let _ = writeln!(text, "  {name:<10}{there} of {} features", all.len());
            for feature in all.iter().filter(|feature| feature.state != "supported") {
                let mark = if feature.required { "✗" } else { "-" };
                let why = feature.why.as_deref().unwrap_or_default();
                let line = format!("{} {}: {why} [{}]", feature.title, feature.state, feature.since);
                wrapped(text, &format!("            {mark} "), "              ", &line);
            }
        }
    }

    fn render_choice(&self, text: &mut String) {
        let choice = &self.choice;
        let backend = choice.backend.as_deref().unwrap_or("nothing");
        let _ = writeln!(text, "\nCHOICE\n  {backend} (backend = {:?})", choice.wanted);
        wrapped(text, "  ", "  ", &choice.why);
    }

    fn render_findings(&self, text: &mut String) {
        match self.findings.len() {
            0 => text.push_str("\nFINDINGS\n  nothing found that weakens protection\n"),
            1 => text.push_str("\nFINDINGS (1)\n"),
            many => text.push_str(&format!("\nFINDINGS ({many}, the worst first)\n")),
        }
        for finding in &self.findings {
            let weight = match finding.weight {
                Weight::High => "HIGH",
                Weight::Medium => "medium",
                Weight::Low => "low",
            };
            let _ = writeln!(text, "  {weight:<8}{}", finding.id);
            wrapped(text, "          ", "          ", &finding.what);
            for item in &finding.items {
                wrapped(text, "            · ", "              ", item);
            }
            wrapped(text, "          do: ", "              ", &finding.remedy);
        }
        if !self.unseen.is_empty() {
            text.push_str("\nNOT LOOKED AT\n");
            for unseen in &self.unseen {
                wrapped(text, "  ", "    ", &format!("{}: {}", unseen.what, unseen.why));
            }
        }
    }
}

/// A paragraph, its first line begun one way and its others another.
fn wrapped(text: &mut String, first: &str, next: &str, paragraph: &str) {
    let mut line = first.to_owned();
    let mut empty = true;
    for word in paragraph.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(text, "{line}");
            next.clone_into(&mut line);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    let _ = writeln!(text, "{line}");
}
