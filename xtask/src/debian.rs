//! Where Debian's packages come from: this host's own source of them, unless told otherwise.

use std::env;

use anyhow::{Context as _, Result};

use crate::run::read;

/// Names another place: an address that ends in `/debian`, of the archive or a mirror of it.
const MIRROR: &str = "ENFORCER_DEBIAN_MIRROR";

/// The address, without a slash at its end.
pub(crate) fn mirror() -> Result<String> {
    if let Ok(named) = env::var(MIRROR) {
        return Ok(named.trim_end_matches('/').to_owned());
    }
    let sources = read("apt-get", &["indextargets", "--format", "$(REPO_URI)"]).unwrap_or_default();
    of(&sources).with_context(|| {
        format!("apt has no source of Debian's packages here: name a mirror, as {MIRROR}=http://…/debian")
    })
}

/// The first of apt's sources, one in a line, that is Debian's archive: mirrors end so, those of security updates do
/// not.
fn of(sources: &str) -> Option<String> {
    let mut places = sources.lines().map(|line| line.trim().trim_end_matches('/'));
    places.find(|place| place.ends_with("/debian")).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_told_from_what_else_apt_has() {
        let sources = "http://a.example/ubuntu/\nhttp://a.example/debian-security/\nhttp://b.example/debian/\n";
        assert_eq!(of(sources).as_deref(), Some("http://b.example/debian"));
        assert_eq!(of("http://a.example/ubuntu/\n"), None);
    }
}
