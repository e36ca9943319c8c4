//! `mpypi-broker init`

use std::path::Path;

use mpypi_broker::{
    authority::{self, Authority, CA, Readers, SERVER, absent},
    clock, settings,
};

use crate::{cli::InitArgs, serve::DATA};

/// Where certificates are, in the data folder.
pub(crate) const FOLDER: &str = "tls";

/// The file as it is written, every setting in it.
const TEMPLATE: &str = include_str!("init/broker.toml");
/// Stands where the certificates are named.
const TLS_OFF: &str = "#cert = \"tls/server.pem\"\n#key = \"tls/server.key\"\n#client_ca = \"tls/ca.pem\"\n";
const TLS_ON: &str = "cert = \"tls/server.pem\"\nkey = \"tls/server.key\"\nclient_ca = \"tls/ca.pem\"\n";
/// Stands where the listener with TLS is.
const LISTENER_OFF: &str = "#[[listeners]]\n#url = \"mqtts://0.0.0.0:8883\"\n";
const LISTENER_ON: &str = "[[listeners]]\nurl = \"mqtts://0.0.0.0:8883\"\n";

pub(crate) fn run(args: InitArgs) -> anyhow::Result<()> {
    let config = args.data.join(settings::FILE);
    let folder = args.data.join(FOLDER);
    if !args.force {
        absent(&config)?;
        if args.tls {
            absent(&folder.join(SERVER))?;
        }
    }
    let now = clock::now();
    if args.tls {
        let host = host_name();
        let authority = match Authority::exists(&folder) {
            true => Authority::open(&folder)?,
            false => {
                let authority = Authority::create(&folder, host.as_deref().unwrap_or("this host"), now)?;
                eprintln!(
                    "made a certificate authority, good for ten years; keep `{}/ca.key` safe",
                    folder.display()
                );
                authority
            }
        };
        let names = match args.name.is_empty() {
            true => ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into_iter().chain(host).collect(),
            false => args.name,
        };
        authority.issue_server(&names, now)?;
        eprintln!("made the broker's certificate for {}, good for 825 days", names.join(", "));
    }
    authority::write(&config, text(args.tls).as_bytes(), Readers::All)?;
    eprintln!("wrote `{}`", config.display());
    eprintln!("next:");
    next(&args.data, args.tls, &folder.join(CA));
    Ok(())
}

/// Prints the commands to type next.
fn next(data: &Path, tls: bool, ca: &Path) {
    let option = match data == Path::new(DATA) {
        true => String::new(),
        false => format!(" --data '{}'", data.display()),
    };
    if tls {
        println!("mpypi-broker user add ci --role publisher --token{option}");
        println!("mpypi-broker cert node kitchen{option}");
    }
    println!("mpypi-broker serve{option}");
    if tls {
        println!(
            "mosquitto_sub -h localhost -p 8883 --cafile '{}' -u ci -P TOKEN -t 'mpypi/#'",
            ca.display()
        );
    }
}

fn text(tls: bool) -> String {
    match tls {
        true => TEMPLATE.replace(TLS_OFF, TLS_ON).replace(LISTENER_OFF, LISTENER_ON),
        false => TEMPLATE.to_owned(),
    }
}

/// This host's name, if it is one that a certificate can be made out to.
fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().ok()?.to_owned();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    (!name.is_empty() && name != "localhost" && name.chars().all(is_plain)).then_some(name)
}

#[cfg(test)]
mod tests {
    use mpypi_broker::{
        Limits,
        listen::tls::ClientAuth,
        settings::{Settings, TlsSettings, UpstreamSettings},
    };

    use super::*;

    /// The settings that a text makes, and all keys in it.
    fn read(text: &str) -> (Settings, toml::Table) {
        (toml::from_str(text).unwrap(), toml::from_str(text).unwrap())
    }

    /// The text with all its settings in force: `#x` is a setting, `# x` is for people.
    fn in_force(text: &str) -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(setting) if !setting.starts_with([' ', '#']) => format!("{setting}\n"),
            _ => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    }

    #[test]
    fn the_file_as_written_is_the_default_and_so_is_every_limit_in_it() {
        let (written, _) = read(&text(false));
        assert_eq!(written.limits, Limits::default());
        assert_eq!(written.tls, TlsSettings::default());
        assert_eq!(written.upstream, UpstreamSettings::default());
        assert_eq!((written.log_json, written.unsafe_open), (false, false));
        assert_eq!(written.places().unwrap(), [], "nowhere");
        assert_eq!(written.data.as_deref(), Some(Path::new(".")));
        let urls: Vec<_> = written.listeners.iter().map(|listener| listener.url).collect();
        assert_eq!(urls, [crate::serve::DEFAULT]);
        let (all, keys) = read(&in_force(&text(false)));
        assert_eq!(all.limits, Limits::default());
        let every = toml::Table::try_from(Limits::default()).unwrap();
        let named = keys["limits"].as_table().unwrap();
        assert_eq!(named.keys().collect::<Vec<_>>(), every.keys().collect::<Vec<_>>());
        assert_eq!(keys["tls"].as_table().unwrap().len(), 4);
        let places: Vec<_> = all.places().unwrap().iter().map(|place| place.endpoint.to_string()).collect();
        assert_eq!(places, ["http://127.0.0.1:8080", "http://127.0.0.1:9090"], "examples");
        assert!(!all.promoter.unsafe_open);
        assert_eq!(keys["promoter"].as_table().unwrap().len(), 3);
        assert!(all.home().unwrap().is_none() && all.home_assistant.url.is_some());
        assert_eq!(keys["home_assistant"].as_table().unwrap().len(), 3);
        assert_eq!(keys["upstream"].as_table().unwrap().len(), 10);
        assert_eq!(keys.len(), 10, "every setting of the file: {keys:?}");
    }

    #[test]
    fn with_tls_its_settings_are_in_force() {
        let (written, _) = read(&text(true));
        let files = written.tls.files().unwrap().unwrap();
        assert_eq!(files.cert, Path::new("tls/server.pem"));
        assert_eq!(files.client_auth, ClientAuth::Optional);
        let urls: Vec<_> = written.listeners.iter().map(|listener| listener.url.to_string()).collect();
        assert_eq!(urls, ["mqtt://127.0.0.1:1883", "mqtts://0.0.0.0:8883"]);
    }
}
