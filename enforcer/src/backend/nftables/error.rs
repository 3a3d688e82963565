//! Why `nf_tables` does not hold what was asked for, and what to do about it.

use std::io;

use crate::wire::Object;

/// Why `nf_tables` does not hold what was asked for. What was active before still is (F4).
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftablesError {
    /// A transaction or a dump failed.
    #[error("nftables table inet {table}: {step}: {error}{}", hint(error))]
    Netlink {
        /// The table.
        table: String,
        /// What was tried.
        step: String,
        /// Why not.
        error: io::Error,
    },
    /// The table is another process's.
    #[error(
        "nftables table inet {table} exists and was not made by enforcer; name another with `nft_table`, or remove it: \
         nft delete table inet {table}"
    )]
    Foreign {
        /// The table.
        table: String,
    },
    /// The kernel holds something else than was sent (F3).
    #[error(
        "nftables table inet {table} does not hold what was sent: {what} differs; the previous rules are active again"
    )]
    ReadBack {
        /// The table.
        table: String,
        /// What of it.
        what: Object,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run as root (CAP_NET_ADMIN)",
        Some(libc::EOPNOTSUPP | libc::ENOENT | libc::EPROTONOSUPPORT) => {
            "; this kernel lacks nf_tables or this expression: load its module, or use backend = \"ebpf\""
        }
        Some(libc::ENOMEM | libc::ENOBUFS | libc::EMSGSIZE) => "; the kernel has no room for it: use fewer endpoints",
        Some(_) | None => "",
    }
}
