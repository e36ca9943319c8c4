//! The `mpypi-broker` command: maps results to exit codes.

mod cert;
mod cli;
mod commands;
mod device;
mod init;
mod log;
mod serve;
mod user;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let done = match cli::Cli::parse().command {
        cli::Command::Serve(args) => serve::run(args).map(|()| true),
        cli::Command::Gateway(args) => serve::run_gateway(args).map(|()| true),
        cli::Command::User(args) => user::run(args).map(|()| true),
        cli::Command::Device(args) => device::run(args).map(|()| true),
        cli::Command::Init(args) => init::run(args).map(|()| true),
        cli::Command::Cert(args) => cert::run(args).map(|()| true),
        cli::Command::Backup(args) => commands::backup::run(&args),
        cli::Command::Restore(args) => commands::restore::run(&args),
        cli::Command::Gc(args) => commands::gc::run(&args).map(|()| true),
        cli::Command::Check(args) => commands::check::run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = serve::hint(&error).or_else(|| commands::hint(&error)) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
