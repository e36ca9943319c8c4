//! `broker.toml`: what `mpypi-broker serve` does when its command line says nothing else.

use std::{
    fmt, fs, io,
    marker::PhantomData,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU64,
    path::{Path, PathBuf},
    str::FromStr,
};

use mpypi_client::{Endpoint as UpstreamEndpoint, args::TrustArgs, trust::TrustError};
use mpypi_protocol::{
    BrokerUrl, ChannelName, NodeId, Root,
    rollout::Window,
    root::{RootError, SignedRoot},
    topic,
};
use serde::{Deserialize, Deserializer};

use crate::{
    Limits,
    access::Channels,
    edge::{self, Hours, Part},
    faces::home::{self, Home},
    gateway::{HttpEndpoint, Place, Site, site::Door},
    listen::{Endpoint, tls},
};

/// The file, in the data folder unless named.
pub const FILE: &str = "broker.toml";

/// How alike two keys are that one was meant for the other, from 0 to 1 (Jaro and Winkler).
const ALIKE: f64 = 0.8;

/// What the file says. All of it is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The folder of the index.
    pub data: Option<PathBuf>,
    /// Where to listen.
    pub listeners: Vec<ListenerSettings>,
    /// Where HTTP answers, if anywhere.
    #[serde(deserialize_with = "one_or_many")]
    pub http: Vec<HttpEndpoint>,
    /// What ota-promoter's devices are shown.
    pub promoter: PromoterSettings,
    /// What Home Assistant is told.
    pub home_assistant: HomeSettings,
    /// The broker whose channels are served here.
    pub upstream: UpstreamSettings,
    /// Certificates.
    pub tls: TlsSettings,
    /// The limits.
    pub limits: Limits,
    /// Whether to log JSON lines.
    pub log_json: bool,
    /// Whether strangers from other machines may come in while there are no users.
    pub unsafe_open: bool,
}

/// One of `[[listeners]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerSettings {
    /// What is listened for, and where.
    pub url: Endpoint,
}

/// `[tls]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TlsSettings {
    /// See [`tls::Files::cert`].
    pub cert: Option<PathBuf>,
    /// See [`tls::Files::key`].
    pub key: Option<PathBuf>,
    /// See [`tls::Files::client_ca`].
    pub client_ca: Option<PathBuf>,
    /// See [`tls::Files::client_auth`].
    pub client_auth: Option<tls::ClientAuth>,
}

/// `[promoter]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromoterSettings {
    /// The channel that they follow.
    pub channel: Option<ChannelName>,
    /// Where; [`PROMOTER`] if nothing is said.
    pub address: Option<HttpEndpoint>,
    /// Whether everybody may read the channel there, also where there are users: those devices cannot log in.
    pub unsafe_open: bool,
}

/// `[home_assistant]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HomeSettings {
    /// Whether it is told anything.
    pub enabled: bool,
    /// See [`Home::prefix`].
    pub prefix: Option<String>,
    /// See [`Home::url`].
    pub url: Option<String>,
}

/// `[upstream]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpstreamSettings {
    /// Its addresses.
    #[serde(deserialize_with = "one_or_many")]
    pub url: Vec<BrokerUrl>,
    /// The CA that vouches for it, if not the system's.
    pub ca: Option<PathBuf>,
    /// The certificate to show it.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// What this broker is called there.
    pub name: Option<NodeId>,
    /// Which channels; all if nothing is said.
    pub channels: Option<Vec<ChannelName>>,
    /// The root of trust whose channels are believed, and no others.
    pub pin: Option<PathBuf>,
    /// Bytes per second that its packages may take.
    pub bandwidth: Option<NonZeroU64>,
    /// The time of day at which packages are fetched.
    pub window: Option<Window>,
    /// How far local time is ahead of UTC, in minutes.
    pub utc_offset: i32,
}

impl UpstreamSettings {
    /// The upstream, if one is named. The files are read.
    ///
    /// # Errors
    /// Says which file is wrong, or what is said of an upstream that is not named.
    pub fn upstream(&self, part: Part) -> Result<Option<edge::Config>, SettingsError> {
        if self.url.is_empty() {
            return match *self == UpstreamSettings::default() {
                true => Ok(None),
                false => Err(SettingsError::NoUpstream),
            };
        }
        if self.channels.as_ref().is_some_and(Vec::is_empty) {
            return Err(SettingsError::NoChannels);
        }
        let trust = TrustArgs { ca: self.ca.clone(), cert: self.cert.clone(), key: self.key.clone() };
        if trust.cert.is_some() != trust.key.is_some() {
            return Err(SettingsError::HalfPair);
        }
        let endpoints = self.url.iter().map(|url| UpstreamEndpoint::new(url.clone(), &trust));
        let pin = self.pin.as_deref().map(pin).transpose()?;
        Ok(Some(edge::Config {
            endpoints: endpoints.collect::<Result<_, _>>()?,
            channels: self.channels.clone().map_or(Channels::All, Channels::Only),
            pin,
            bandwidth: self.bandwidth,
            window: self.window.map(|window| Hours { window, utc_offset: self.utc_offset }),
            name: self.name.clone(),
            part,
        }))
    }
}

/// The root in a file.
fn pin(path: &Path) -> Result<Root, SettingsError> {
    let bytes = fs::read(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    let root = SignedRoot::parse(&bytes).and_then(Root::pin);
    root.map_err(|problem| SettingsError::Pin { path: path.to_owned(), problem })
}

/// Where ota-promoter's devices come if nothing else is said.
pub const PROMOTER: HttpEndpoint =
    HttpEndpoint { is_tls: false, address: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9090) };

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what it should be; says where.
    #[error("`{}` is not in order: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which line.
        problem: String,
        /// The key that was meant instead of one that means nothing.
        meant: Option<String>,
    },
    /// Certificates are named by halves.
    #[error("there is a certificate without a key, or a key without a certificate")]
    HalfPair,
    /// Authorities without a certificate of ours.
    #[error("client certificates need TLS, which needs a certificate and its key")]
    NoCertificate,
    /// Something for ota-promoter's devices, but no channel.
    #[error("it is not said which channel ota-promoter's devices follow")]
    NoPromoterChannel,
    /// Nowhere that Home Assistant could look.
    #[error("`{0}` is no prefix for Home Assistant: use a topic of its own, without wildcards")]
    HomePrefix(String),
    /// Nowhere that a browser could look.
    #[error("`{0}` is no URL for Home Assistant to show: it starts with `http://` or `https://`")]
    HomeUrl(String),
    /// Something about an upstream, but not which.
    #[error("it is not said where the upstream is")]
    NoUpstream,
    /// An upstream of which nothing is taken.
    #[error("no channel of the upstream is chosen")]
    NoChannels,
    /// The upstream cannot be trusted.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A file that is to be a root of trust is none.
    #[error("`{}` is no root to pin", path.display())]
    Pin {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        problem: RootError,
    },
    /// A limit that nothing could be done with.
    #[error("the limit `{name}` {problem}")]
    Limit {
        /// The limit's name.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl Settings {
    /// Reads a file. Its relative paths are relative to its folder.
    ///
    /// # Errors
    /// Says what is wrong and in which line.
    pub fn load(path: &Path) -> Result<Settings, SettingsError> {
        let text = fs::read_to_string(path)
            .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        let mut settings = Settings::parse(&text, path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let TlsSettings { cert, key, client_ca, .. } = &mut settings.tls;
        let UpstreamSettings { ca, cert: shown, key: its_key, pin, .. } = &mut settings.upstream;
        let all = [&mut settings.data, cert, key, client_ca, ca, shown, its_key, pin];
        for path in all.into_iter().flatten() {
            *path = folder.join(&*path);
        }
        Ok(settings)
    }

    fn parse(text: &str, path: &Path) -> Result<Settings, SettingsError> {
        toml::from_str(text).map_err(|error: toml::de::Error| SettingsError::Format {
            path: path.to_owned(),
            meant: meant(error.message()),
            problem: error.to_string().trim_end().to_owned(),
        })
    }
}

impl Settings {
    /// Where HTTP answers, and what.
    ///
    /// # Errors
    /// There is something for ota-promoter's devices, but no channel.
    pub fn places(&self) -> Result<Vec<Place>, SettingsError> {
        let main = self.http.iter().map(|&endpoint| Place { endpoint, site: Site::Main });
        let mut places: Vec<_> = main.collect();
        let PromoterSettings { channel, address, unsafe_open } = &self.promoter;
        match channel {
            Some(channel) => {
                let door = if *unsafe_open { Door::Guests(channel.clone()) } else { Door::Login };
                let site = Site::Promoter { channel: channel.clone(), door };
                places.push(Place { endpoint: address.unwrap_or(PROMOTER), site });
            }
            None if address.is_some() || *unsafe_open => return Err(SettingsError::NoPromoterChannel),
            None => {}
        }
        Ok(places)
    }
}

impl Settings {
    /// What Home Assistant is told, if anything.
    ///
    /// # Errors
    /// It could not look there.
    pub fn home(&self) -> Result<Option<Home>, SettingsError> {
        let HomeSettings { enabled, prefix, url } = &self.home_assistant;
        let prefix = prefix.as_deref().unwrap_or(home::PREFIX);
        let is_ours = prefix.starts_with('$') || prefix == "mpypi" || prefix.starts_with("mpypi/");
        if is_ours || prefix.ends_with('/') || topic::check_name(prefix).is_err() {
            return Err(SettingsError::HomePrefix(prefix.to_owned()));
        }
        if let Some(url) =
            url.as_ref().filter(|url| !url.starts_with("http://") && !url.starts_with("https://"))
        {
            return Err(SettingsError::HomeUrl(url.clone()));
        }
        Ok(enabled.then(|| Home { prefix: prefix.to_owned(), url: url.clone() }))
    }
}

/// An address in a text.
trait Address: FromStr<Err: fmt::Display> {
    /// Two of them, for who wrote something else.
    const EXAMPLES: [&'static str; 2];
}

impl Address for HttpEndpoint {
    const EXAMPLES: [&'static str; 2] = ["127.0.0.1:8080", "https://0.0.0.0:8443"];
}

impl Address for BrokerUrl {
    const EXAMPLES: [&'static str; 2] = ["mqtt://10.0.0.7", "mqtts://site-7:SECRET@hub.example"];
}

/// One address, or several in an array.
fn one_or_many<'de, A: Address, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<A>, D::Error> {
    struct OneOrMany<A>(PhantomData<A>);

    impl<'de, A: Address> serde::de::Visitor<'de> for OneOrMany<A> {
        type Value = Vec<A>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let [one, other] = A::EXAMPLES;
            write!(f, "an address as `{one}` or `{other}`, or an array of them")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            text.parse().map(|endpoint| vec![endpoint]).map_err(E::custom)
        }

        fn visit_seq<S: serde::de::SeqAccess<'de>>(self, mut seq: S) -> Result<Self::Value, S::Error> {
            let mut all = Vec::new();
            while let Some(text) = seq.next_element::<String>()? {
                all.push(text.parse().map_err(serde::de::Error::custom)?);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(OneOrMany(PhantomData))
}

impl TlsSettings {
    /// The files, if TLS is set up.
    ///
    /// # Errors
    /// It is set up by halves.
    pub fn files(self) -> Result<Option<tls::Files>, SettingsError> {
        let TlsSettings { cert, key, client_ca, client_auth } = self;
        match (cert, key) {
            (Some(cert), Some(key)) => {
                let client_auth = client_auth.unwrap_or_default();
                Ok(Some(tls::Files { cert, key, client_ca, client_auth }))
            }
            (None, None) if client_ca.is_none() && client_auth.is_none() => Ok(None),
            (None, None) => Err(SettingsError::NoCertificate),
            _ => Err(SettingsError::HalfPair),
        }
    }
}

impl SettingsError {
    /// What to do about it, if we know.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            SettingsError::Format { meant: Some(meant), .. } => Some(format!("did you mean `{meant}`?")),
            SettingsError::NoPromoterChannel => {
                Some("name it with `--promoter-channel`, or as `channel` in `[promoter]`".to_owned())
            }
            SettingsError::NoUpstream => {
                Some("name it with `--upstream`, or as `url` in `[upstream]`".to_owned())
            }
            SettingsError::NoChannels => {
                Some("name some as `channels` in `[upstream]`, or leave that out for all".to_owned())
            }
            SettingsError::Trust(error) => error.hint().map(str::to_owned),
            SettingsError::HalfPair | SettingsError::NoCertificate => Some(
                "give both `--tls-cert` and `--tls-key`, or make both with `mpypi-broker init --tls`"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// The known key that is most like the unknown one that a message complains about.
fn meant(message: &str) -> Option<String> {
    let (_, names) = message.split_once("unknown field `")?;
    let mut names = names.split('`').step_by(2);
    let unknown = names.next()?;
    names
        .map(|name| (strsim::jaro_winkler(unknown, name), name))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, name)| name.to_owned())
}

/// Times in the file: seconds as a number, or a text as `500ms`, `30s`, `5m` or `1h`.
pub(crate) mod duration {
    use std::{fmt, time::Duration};

    use serde::{Deserializer, Serializer, de};

    /// Longest time that is one, in seconds: a year.
    const LONGEST: f64 = 366.0 * 24.0 * 3600.0;

    pub(crate) fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{}ms", time.as_millis()))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        deserializer.deserialize_any(Time)
    }

    struct Time;

    impl de::Visitor<'_> for Time {
        type Value = Duration;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("seconds, or a text as `500ms`, `30s`, `5m` or `1h`, at most a year")
        }

        fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Duration, E> {
            self.visit_f64(seconds as f64)
        }

        fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Duration, E> {
            self.visit_f64(seconds as f64)
        }

        fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Duration, E> {
            match (0.0..=LONGEST).contains(&seconds) {
                true => Ok(Duration::from_secs_f64(seconds)),
                false => Err(E::invalid_value(de::Unexpected::Float(seconds), &self)),
            }
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
            let (number, unit) = text.split_at(split);
            let factor = match unit.trim() {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            };
            match number.parse::<f64>() {
                Ok(number) => self.visit_f64(number * factor),
                Err(_) => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(text, Path::new(FILE))
    }

    #[test]
    fn an_empty_file_says_nothing_and_a_full_one_all() {
        assert_eq!(parse("").unwrap(), Settings::default());
        let settings = parse(
            "data = \"index\"\nlog_json = true\nunsafe_open = true\n\
             listeners = [{ url = \"mqtts://0.0.0.0\" }, { url = \"127.0.0.1:1884\" }]\n\
             [tls]\ncert = \"a\"\nkey = \"b\"\nclient_ca = \"c\"\nclient_auth = \"required\"\n\
             [limits]\nclients = 10\nconnect = 2\nwrite_stall = \"1.5m\"\n",
        )
        .unwrap();
        let urls: Vec<_> = settings.listeners.iter().map(|listener| listener.url.to_string()).collect();
        assert_eq!(urls, ["mqtts://0.0.0.0:8883", "mqtt://127.0.0.1:1884"]);
        assert_eq!(settings.limits.clients, 10);
        assert_eq!(settings.limits.connect, Duration::from_secs(2));
        assert_eq!(settings.limits.write_stall, Duration::from_secs(90));
        assert_eq!(settings.limits.packet, Limits::default().packet);
        let files = settings.tls.files().unwrap().unwrap();
        assert_eq!(files.client_auth, tls::ClientAuth::Required);
    }

    #[test]
    fn a_wrong_key_or_value_is_refused_with_its_line_and_what_was_meant() {
        for (text, meant) in [
            ("[limits]\nclient = 3\n", Some("clients")),
            ("\nlog-json = true\n", Some("log_json")),
            ("[tls]\nclientca = \"x\"\n", Some("client_ca")),
            ("\nsomething = 1\n", None),
            ("[limits]\nconnect = \"soon\"\n", None),
            ("[limits]\nconnect = -1\n", None),
            ("[limits]\nconnect = \"1e999s\"\n", None),
            ("\nlisteners = [{ url = \"ftp://127.0.0.1\" }]\n", None),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.to_string().contains("line 2"), "{text}: {error}");
            assert_eq!(
                error.hint(),
                meant.map(|meant| format!("did you mean `{meant}`?")),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn tls_by_halves_is_refused() {
        let files = |text: &str| parse(text).unwrap().tls.files();
        assert!(matches!(files(""), Ok(None)));
        assert!(matches!(files("tls.cert = \"a\""), Err(SettingsError::HalfPair)));
        assert!(matches!(files("tls.client_ca = \"a\""), Err(SettingsError::NoCertificate)));
    }

    #[test]
    fn http_answers_at_each_place_that_is_named() {
        let places = |text: &str| {
            let places = parse(text).unwrap().places();
            places.map(|all| all.iter().map(|place| place.endpoint.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(places("http = \"127.0.0.1:8080\"").unwrap(), ["http://127.0.0.1:8080"]);
        let text = "http = [\"127.0.0.1:80\", \"https://[::]:443\"]\npromoter.channel = \"dev\"";
        assert_eq!(
            places(text).unwrap(),
            ["http://127.0.0.1:80", "https://[::]:443", "http://127.0.0.1:9090"]
        );
        assert!(matches!(places("promoter.unsafe_open = true"), Err(SettingsError::NoPromoterChannel)));
        for wrong in
            ["http = 80", "http = [\"x\"]", "promoter.channel = \"a/b\"", "promoter.channels = \"a\""]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn home_assistant_is_told_only_if_asked_for_and_where_it_can_look() {
        let home = |text: &str| parse(text).unwrap().home();
        assert_eq!(home("home_assistant.url = \"http://hub\"").unwrap(), None);
        let told = home("[home_assistant]\nenabled = true\nprefix = \"ha\"").unwrap().unwrap();
        assert_eq!((&*told.prefix, told.url), ("ha", None));
        assert_eq!(home("home_assistant.enabled = true").unwrap().unwrap().prefix, "homeassistant");
        for prefix in ["", "a/#", "$SYS", "mpypi/nodes", "a/"] {
            assert!(home(&format!("home_assistant.prefix = \"{prefix}\"")).is_err(), "{prefix}");
        }
        assert!(home("home_assistant.url = \"hub\"").is_err());
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        fs::write(&path, "data = \".\"\n[tls]\ncert = \"tls/server.pem\"\nkey = \"/etc/key.pem\"\n").unwrap();
        let settings = Settings::load(&path).unwrap();
        assert_eq!(settings.data, Some(folder.path().join(".")));
        assert_eq!(settings.tls.cert, Some(folder.path().join("tls/server.pem")));
        assert_eq!(settings.tls.key, Some(PathBuf::from("/etc/key.pem")));
    }
}
