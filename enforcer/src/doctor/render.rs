//! A report as a person reads it, at three in the morning perhaps.

use crate::{
    text::{self, Page},
    wire::doctor::{FeatureState, Report, Side, Weight},
};

/// Text is broken before this column, so that it stays readable in a narrow terminal.
const WIDTH: usize = 110;

impl Report {
    /// As a person reads it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut page = Page::default();
        self.render_host(&mut page);
        self.render_features(&mut page);
        self.render_choice(&mut page);
        self.render_findings(&mut page);
        page.into_text()
    }

    fn render_host(&self, page: &mut Page) {
        let host = &self.host;
        page.line("HOST");
        let mut line = |key: &str, value: &str| page.line(format_args!("  {key:<10}{value}"));
        match &host.root {
            Some(root) => line("image", &format!("{root}, looked at, not run")),
            None => line("host", "this one"),
        }
        line("kernel", &host.kernel);
        line("config", &host.config);
        if host.root.is_none() {
            line("cgroup", host.cgroup.as_deref().unwrap_or("no cgroup v2 is mounted"));
            let active = host.active.map(|backend| backend.to_string());
            line("active", active.as_deref().unwrap_or("nothing"));
            let daemon = host
                .daemon
                .map_or_else(|| "does not answer".to_owned(), |pid| format!("pid {pid}"));
            line("daemon", &daemon);
        }
    }

    fn render_features(&self, page: &mut Page) {
        page.line("");
        page.line("BACKENDS");
        for (of, name) in [
            (Side::Ebpf, "ebpf"),
            (Side::Nftables, "nftables"),
            (Side::Either, "any"),
        ] {
            let all: Vec<_> = self.features.iter().filter(|feature| feature.of == of).collect();
            let there = all
                .iter()
                .filter(|feature| feature.state == FeatureState::Supported)
                .count();
            page.line(format_args!("  {name:<10}{there} of {} features", all.len()));
            for feature in all.iter().filter(|feature| feature.state != FeatureState::Supported) {
                let mark = if feature.required { "✗" } else { "-" };
                let why = feature.why.as_deref().unwrap_or_default();
                let line = format!("{} {}: {why} [{}]", feature.title, feature.state, feature.since);
                wrapped(page, &format!("            {mark} "), "              ", &line);
            }
        }
    }

    fn render_choice(&self, page: &mut Page) {
        let choice = &self.choice;
        let backend = choice.backend.map(|backend| backend.to_string());
        let backend = backend.as_deref().unwrap_or("nothing");
        page.line("");
        page.line("CHOICE");
        page.line(format_args!("  {backend} (backend = \"{}\")", choice.wanted));
        wrapped(page, "  ", "  ", &choice.why);
    }

    fn render_findings(&self, page: &mut Page) {
        page.line("");
        match self.findings.len() {
            0 => {
                page.line("FINDINGS");
                page.line("  nothing found that weakens protection");
            }
            1 => page.line("FINDINGS (1)"),
            many => page.line(format_args!("FINDINGS ({many}, the worst first)")),
        }
        for finding in &self.findings {
            let weight = match finding.weight {
                Weight::High => "HIGH",
                Weight::Medium => "medium",
                Weight::Low => "low",
            };
            page.line(format_args!("  {weight:<8}{}", finding.id));
            wrapped(page, "          ", "          ", &finding.what);
            for item in &finding.items {
                wrapped(page, "            · ", "              ", item);
            }
            wrapped(page, "          do: ", "              ", &finding.remedy);
        }
        if !self.unseen.is_empty() {
            page.line("");
            page.line("NOT LOOKED AT");
            for unseen in &self.unseen {
                wrapped(page, "  ", "    ", &format!("{}: {}", unseen.what, unseen.why));
            }
        }
    }
}

/// A paragraph, its first line begun one way and its others another.
fn wrapped(page: &mut Page, first: &str, next: &str, paragraph: &str) {
    let mut line = first.to_owned();
    let mut empty = true;
    // Broken at our own blanks alone, and after what is not printable has become longer.
    let paragraph = text::line(paragraph);
    for word in paragraph.split(' ').filter(|word| !word.is_empty()) {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            page.line(&line);
            next.clone_into(&mut line);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    page.line(&line);
}
