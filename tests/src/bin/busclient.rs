//! A root client of a NATS server behind a name, as jobs are: before each connection and reconnection it asks
//! `enforcer` for a refresh (B3), and sends itself messages all the while. Prints `refreshed`, `connected SERVER` once
//! a message came back from another server than before, and `failed WHY`, a line each.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use async_nats::{ConnectOptions, ReconnectToServer};
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
    runtime.block_on(run(cli))
}

async fn run(cli: Cli) -> Result<()> {
    refresh(cli.socket.clone()).await;
    let socket = cli.socket.clone();
    let client = ConnectOptions::new()
        .connection_timeout(PATIENCE)
        .reconnect_to_server_callback(move |servers, _| {
            let socket = socket.clone();
            async move {
                // In a task of its own: the callback's future has to be `Sync`.
                let _ = tokio::spawn(refresh(socket)).await;
                let server = servers.into_iter().next()?;
                Some(ReconnectToServer {
                    addr: server.addr,
                    delay: Some(PAUSE),
                })
            }
        })
        .connect(format!("nats://{}", cli.server))
        .await?;
    let mut echo = client.subscribe("echo").await?;
    let mut at = String::new();
    loop {
        let round_trip = async {
            client.publish("echo", "hello".into()).await.ok()?;
            echo.next().await
        };
        if let Ok(Some(_)) = tokio::time::timeout(PATIENCE / 10, round_trip).await {
            let server = client.server_info().server_name;
            if server != at {
                println!("connected {server}");
                at = server;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn refresh(socket: PathBuf) {
    match enforcer_client::refresh(&socket, PATIENCE * 5).await {
        Ok(_) => println!("refreshed"),
        Err(error) => println!("failed {error}"),
    }
}
