//! The `mpypi-broker` command: maps results to exit codes.

mod cert;
mod cli;
mod init;
mod log;
mod serve;
mod user;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let done = match cli::Cli::parse().command {
        cli::Command::Serve(args) => serve::run(args),
        cli::Command::User(args) => user::run(args),
        cli::Command::Init(args) => init::run(args),
        cli::Command::Cert(args) => cert::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = serve::hint(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
