//! `mpypi clock`

use mpypi_client::BrokerArgs;
use serde_json::json;

use super::{brokers, interrupted, print};
use crate::{
    cli::SignArgs,
    clock::{Event, sentence, serve},
    report::{chain, say},
};

const EXAMPLES: &str = "\
A device without a clock that pins a root asks what time it is, so that it notices lists that have expired. This answers \
all of them, until Ctrl-C or SIGTERM, with a key that the root delegates to the channel `time`; it goes by this machine's \
clock.

Examples:
  mpypi keys new clock; mpypi keys delegate time --key clock     then sign and publish the root
  mpypi clock --broker mqtts://publisher:secret@hub.local";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    sign: SignArgs,
    /// Print one JSON object a line, for each answer
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let signing = args.sign.signing();
    let brokers = brokers(args.broker)?;
    let mut tell = |event: Event<'_>| match event {
        Event::Listening { key } => say(&format!("telling the time, signed by {key}; Ctrl-C ends it")),
        Event::Told(answer) => {
            let text = match args.json {
                true => {
                    json!({ "node": answer.node, "nonce": answer.nonce, "time": answer.time.to_string() })
                        .to_string()
                }
                false => sentence(&answer.node, answer.time),
            };
            if let Err(error) = print(&format!("{text}\n")) {
                say(&format!("warning: cannot write to stdout: {error}"));
            }
        }
        Event::Ignored { topic, why } => {
            say(&format!("ignored what came on {}: {why}", topic.escape_debug()))
        }
        Event::Refused(refusal) => say(&format!("warning: the broker refused an answer: {refusal}")),
        Event::Lost { error, pause } => {
            say(&format!("{}; again in {:.1} s", chain(error), pause.as_secs_f64()));
        }
    };
    tokio::select! {
        ended = serve(&brokers, &signing, &mut tell) => match ended? {},
        stop = interrupted() => Ok(stop?),
    }
}
