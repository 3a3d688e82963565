//! A root client of a NATS server behind a name, as jobs are: before each connection it asks `enforcer` for a refresh (B3), then
//! resolves, connects and sends itself messages until the server goes away. Prints `connected SERVER` and `lost`, a line each.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser;
use futures_util::StreamExt as _;

const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Cli {
    /// cgroup to enter first
    #[arg(long)]
    cgroup: PathBuf,
    /// Control socket of the daemon
    #[arg(long)]
    socket: PathBuf,
    /// Where the server is: NAME:PORT
    server: String,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    std::fs::write(cli.cgroup.join("cgroup.procs"), std::process::id().to_string()).context("enter the cgroup")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        loop {
            match connection(&cli).await {
                Ok(()) => println!("lost"),
                Err(error) => println!("failed {error:#}"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    })
}

/// One connection, from the refresh before it to its end.
async fn connection(cli: &Cli) -> Result<()> {
    enforcer::refresh(&cli.socket, PATIENCE * 5).await?;
    let options = async_nats::ConnectOptions::new()
        .max_reconnects(1)
        .connection_timeout(PATIENCE);
    let client = options.connect(format!("nats://{}", cli.server)).await?;
    let mut echo = client.subscribe("echo").await?;
    println!("connected {}", client.server_info().server_name);
    loop {
        let round_trip = async {
            client.publish("echo", "hello".into()).await.ok()?;
            echo.next().await
        };
        if !matches!(tokio::time::timeout(PATIENCE / 4, round_trip).await, Ok(Some(_))) {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}
