//! Tests that need a host of their own: each runs as root of a user namespace, which any user may make, with its own
//! network, mounts and processes. nftables, sockets, state files and signals are real there.

use std::{any::type_name_of_val, env, fs, io, path::Path, process::Command};

use nix::mount::{MsFlags, mount};
use tokio::{runtime::Builder, task::LocalSet};

/// What a test comes to.
pub(crate) type Test = Result<(), Box<dyn std::error::Error>>;

/// Set in the process that runs such a test.
const INSIDE: &str = "ENFORCER_TEST_INSIDE";

/// What names mean there.
const HOSTS: &str = "127.0.0.1 localhost\n127.0.0.8 bus.test\n";
/// All other names are asked of nobody.
const NO_SERVER: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// Runs the body of a test on a host of its own: an empty file system on `/run`, and a network with loopback alone. The
/// body is a closure of the test function, whose name it bears.
pub(crate) fn on_a_host_of_its_own(body: impl FnOnce() -> Test) -> Test {
    let name = type_name_of_val(&body);
    run_inside(name, body)
}

/// As [`on_a_host_of_its_own`], for a body that waits, in a runtime like the program's.
pub(crate) fn in_a_runtime_of_its_own<F: Future<Output = Test>>(body: impl FnOnce() -> F) -> Test {
    let name = type_name_of_val(&body);
    run_inside(name, || {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, body())
    })
}

/// Has the test's own program run this test alone, in its namespaces; or is there.
fn run_inside(name_of_body: &str, body: impl FnOnce() -> Test) -> Test {
    if env::var_os(INSIDE).is_some() {
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
        for (file, text) in [("hosts", HOSTS), ("resolv.conf", NO_SERVER)] {
            let ours = Path::new("/run").join(file);
            fs::write(&ours, text)?;
            let over = Path::new("/etc").join(file).canonicalize()?;
            mount(Some(&ours), &over, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        return body();
    }
    let name = name_of_body.trim_end_matches("::{{closure}}");
    let name = name.split_once("::").map_or(name, |(_, path)| path);
    let run = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
        ])
        .args(["--", "sh", "-c"])
        .arg("ip link set lo up && exec \"$@\"")
        .arg("sh")
        .arg(env::current_exe()?)
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .map_err(|error| io::Error::other(format!("unshare (of util-linux): {error}")))?;
    let (stdout, stderr) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    // A name that is not found is no failure to the program.
    assert!(
        run.status.success() && stdout.contains(" 1 passed"),
        "{name} on a host of its own (it needs user namespaces, nf_tables and iproute2): {}\n{stdout}\n{stderr}",
        run.status
    );
    Ok(())
}
