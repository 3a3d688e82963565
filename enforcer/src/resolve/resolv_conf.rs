//! `resolv.conf` as glibc 2.36 and Go read it: what makes no sense costs only itself, and no line costs the file. Pure.

use std::{fmt, net::IpAddr, time::Duration};

use hickory_resolver::proto::rr::Name;

/// Most servers asked (resolv.conf(5), `MAXNS`; Go's `dnsReadConfig` likewise).
const MAX_SERVERS: usize = 3;
/// Bounds and defaults of options (glibc, resolv.h: `RES_MAXNDOTS` and its like).
const MAX_NDOTS: usize = 15;
const MAX_TIMEOUT: u64 = 30;
const MAX_ATTEMPTS: u32 = 5;

/// A name server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NameServer {
    pub(super) address: IpAddr,
    /// The interface by which a link-local one is reached.
    pub(super) zone: Option<String>,
}

impl From<IpAddr> for NameServer {
    fn from(address: IpAddr) -> Self {
        Self { address, zone: None }
    }
}

impl fmt::Display for NameServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.zone {
            None => write!(f, "{}", self.address),
            Some(zone) => write!(f, "{}%{zone}", self.address),
        }
    }
}

/// What a host asks of DNS, and whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ResolvConf {
    /// In the order of the file; this host where it names none.
    pub(super) servers: Vec<NameServer>,
    /// The domains to search; the host's own where it names none.
    pub(super) search: Vec<Name>,
    /// A name with so many dots is first tried as it is.
    pub(super) ndots: usize,
    /// How long one try of one server may take.
    pub(super) timeout: Duration,
    /// How often each is tried.
    pub(super) attempts: u32,
    /// TCP alone (`use-vc`).
    pub(super) tcp: bool,
    /// Another server first each time.
    pub(super) rotate: bool,
}

impl ResolvConf {
    /// Reads the file's text; none is as an empty one. `host` is this host's name.
    pub(super) fn parse(text: &str, host: &str) -> Self {
        let mut conf = Self {
            servers: Vec::new(),
            search: Vec::new(),
            ndots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            tcp: false,
            rotate: false,
        };
        // The last of `domain` and `search` counts, though none of it be a domain.
        let mut says_where = false;
        for line in text.lines() {
            // A keyword begins in the first column, and blanks end it.
            let Some((keyword, rest)) = line.split_once([' ', '\t']) else {
                continue;
            };
            let mut words = rest.split_whitespace();
            match keyword {
                "nameserver" => conf.servers.extend(words.next().and_then(server)),
                "domain" | "search" => {
                    let most = if keyword == "domain" { 1 } else { usize::MAX };
                    conf.search = words.take(most).filter_map(domain).collect();
                    says_where = true;
                }
                "options" => words.for_each(|word| conf.set(word)),
                _ => {}
            }
        }
        conf.servers.truncate(MAX_SERVERS);
        if conf.servers.is_empty() {
            // glibc asks the first, Go both in this order.
            conf.servers = vec![
                IpAddr::from([127, 0, 0, 1]).into(),
                IpAddr::from(std::net::Ipv6Addr::LOCALHOST).into(),
            ];
        }
        if !says_where {
            conf.search = host
                .split_once('.')
                .and_then(|(_, own)| domain(own))
                .into_iter()
                .collect();
        }
        conf
    }

    fn set(&mut self, option: &str) {
        // What is no number is 0 (atoi(3)).
        let number = |text: &str| text.parse::<u32>().unwrap_or(0);
        match option.split_once(':') {
            Some(("ndots", value)) => self.ndots = usize::try_from(number(value)).unwrap_or(MAX_NDOTS).min(MAX_NDOTS),
            Some(("timeout", value)) => {
                self.timeout = Duration::from_secs(u64::from(number(value)).clamp(1, MAX_TIMEOUT));
            }
            Some(("attempts", value)) => self.attempts = number(value).clamp(1, MAX_ATTEMPTS),
            Some(_) => {}
            None => match option {
                "use-vc" | "usevc" | "tcp" => self.tcp = true,
                "rotate" => self.rotate = true,
                _ => {}
            },
        }
    }
}

/// An address, perhaps with a zone, which means nothing of one that is not link-local.
fn server(word: &str) -> Option<NameServer> {
    let end = word.find([';', '#']).unwrap_or(word.len());
    let word = word.get(..end)?;
    let (address, zone) = word
        .split_once('%')
        .map_or((word, None), |(address, zone)| (address, Some(zone)));
    let address: IpAddr = address.parse().ok()?;
    let is_link_local = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let zone = zone.filter(|_| is_link_local).map(str::to_owned);
    Some(NameServer { address, zone })
}

/// A domain to search: of whatever bytes, as DNS has it, but no empty label and none too long.
fn domain(word: &str) -> Option<Name> {
    let word = word.strip_suffix('.').unwrap_or(word);
    let labels = word.split('.').map(str::as_bytes);
    let labels: Vec<&[u8]> = if word.is_empty() { Vec::new() } else { labels.collect() };
    if labels.iter().any(|label| label.is_empty()) {
        return None;
    }
    let mut name = Name::from_labels(labels).ok()?;
    name.set_fqdn(true);
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Servers, then the domains, then what differs from the defaults.
    fn check(text: &str, expected: &str) {
        let conf = ResolvConf::parse(text, "vm1.host.example");
        let join = |words: Vec<String>| words.join(",");
        let mut said = format!(
            "{} {}",
            join(conf.servers.iter().map(ToString::to_string).collect()),
            join(conf.search.iter().map(ToString::to_string).collect())
        );
        for (differs, words) in [
            (conf.ndots != 1, format!(" ndots {}", conf.ndots)),
            (
                conf.timeout != Duration::from_secs(5),
                format!(" timeout {:?}", conf.timeout),
            ),
            (conf.attempts != 2, format!(" attempts {}", conf.attempts)),
            (conf.tcp, " tcp".to_owned()),
            (conf.rotate, " rotate".to_owned()),
        ] {
            said += if differs { &words } else { "" };
        }
        assert_eq!(said, expected, "{text:?}");
    }

    #[test]
    fn a_file_is_read_as_glibc_and_go_read_it() {
        for (text, expected) in [
            ("", "127.0.0.1,::1 host.example."),
            ("search a.example\n", "127.0.0.1,::1 a.example."),
            ("nameserver 10.0.0.1\n", "10.0.0.1 host.example."),
            (
                "nameserver\t10.0.0.1 # ours\nnameserver 10.0.0.2;x\n",
                "10.0.0.1,10.0.0.2 host.example.",
            ),
            (
                "nameserver fe80::53%eth1\nnameserver 2001:db8::1\nnameserver 2001:db8::2%eth1\n",
                "fe80::53%eth1,2001:db8::1,2001:db8::2 host.example.",
            ),
            (
                "nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4\n",
                "1.1.1.1,1.1.1.2,1.1.1.3 host.example.",
            ),
            ("nameserver ns.example\nnameserver 10.0.0.1\n", "10.0.0.1 host.example."),
            (
                "#nameserver 10.0.0.1\n;nameserver 10.0.0.2\n nameserver 10.0.0.3\n",
                "127.0.0.1,::1 host.example.",
            ),
            ("nameserver 10.0.0.1\nsearch a..b c.example\n", "10.0.0.1 c.example."),
            ("nameserver 10.0.0.1\nsearch .\n", "10.0.0.1 ."),
            (
                "nameserver 10.0.0.1\ndomain a.example b.example\n",
                "10.0.0.1 a.example.",
            ),
            (
                "nameserver 10.0.0.1\nsearch a.example\ndomain b.example\n",
                "10.0.0.1 b.example.",
            ),
            ("nameserver 10.0.0.1\nsearch a..b\n", "10.0.0.1 "),
            (
                "nameserver 10.0.0.1\noptions ndots:3 timeout:2 attempts:1 use-vc rotate edns0 nonsense\n",
                "10.0.0.1 host.example. ndots 3 timeout 2s attempts 1 tcp rotate",
            ),
            (
                "nameserver 10.0.0.1\noptions ndots:99 timeout:x attempts:0\n",
                "10.0.0.1 host.example. ndots 15 timeout 1s attempts 1",
            ),
            (
                "nameserver 10.0.0.1\r\nsortlist x\nlookup file bind\n",
                "10.0.0.1 host.example.",
            ),
        ] {
            check(text, expected);
        }
        let long = format!("nameserver 10.0.0.1\nsearch {}.example ok.example\n", "x".repeat(82));
        check(&long, "10.0.0.1 ok.example.");
        check(
            "nameserver 10.0.0.1\nsearch (none) -x.example ok\n",
            r"10.0.0.1 \(none\).,\-x.example.,ok.",
        );
    }
}
