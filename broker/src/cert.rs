//! `mpypi-broker cert`

use mpypi_broker::{authority::Authority, clock};
use mpypi_protocol::NodeId;

use crate::{
    cli::{CertArgs, CertCommand},
    init::FOLDER,
};

pub(crate) fn run(args: CertArgs) -> anyhow::Result<()> {
    let authority = Authority::open(&args.at.data.join(FOLDER))?;
    match args.command {
        CertCommand::Node { name, force } => {
            let files = authority.issue_node(&NodeId::new(&name)?, force, clock::now())?;
            eprintln!(
                "made a certificate for node `{name}`, good for 825 days; its key is in `{}`",
                files.key.display()
            );
            eprintln!("next, on the node or to try it:");
            println!(
                "mosquitto_sub -h localhost -p 8883 -i '{name}' --cafile '{}' --cert '{}' --key '{}' \
                 -t 'mpypi/channels/+'",
                files.ca.display(),
                files.cert.display(),
                files.key.display()
            );
        }
        CertCommand::Renew { name } => {
            let names = authority.renew_server(&name, clock::now())?;
            eprintln!("renewed the broker's certificate for {}, good for 825 days", names.join(", "));
        }
    }
    Ok(())
}
