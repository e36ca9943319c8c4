//! `mpypi`, the publisher's command line.

use std::{
    io::{Write, stderr},
    process::ExitCode,
};

use clap::Parser;
use mpypi_publisher::{
    cli::Cli,
    report::{exit_code, hint, painted, wants_color},
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // 0 for --help and --version, 2 for wrong usage.
        Err(answer) => answer.exit(),
    };
    let done = match tokio::runtime::Runtime::new() {
        Ok(runtime) => {
            let done = runtime.block_on(cli.run());
            // After Ctrl-C a thread may still be reading a large folder: nobody waits for it.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(error.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let color = wants_color(&stderr());
            let mut text = format!("{} {error:#}\n", painted("error:", "31;1", color));
            if let Some(hint) = hint(&error) {
                text += &format!("{} {hint}\n", painted("hint:", "36;1", color));
            }
            // Nobody is left to tell if this fails.
            let _ = stderr().write_all(text.as_bytes());
            ExitCode::from(exit_code(&error))
        }
    }
}
