//! Publishing out of a git repository: a real one, behind a real server of git's, over TLS and with a login.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use mpypi_protocol::UpdateList;
use mpypi_tests::{Authority, Client, Output, Server, Validity, World, run, run_with};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// Runs git, for a test's repositories; no settings of this machine have a say.
fn git(world: &World, folder: &str, arguments: &[&str]) -> String {
    git_with(world, folder, arguments, b"")
}

fn git_with(world: &World, folder: &str, arguments: &[&str], input: &[u8]) -> String {
    std::fs::create_dir_all(world.path(folder)).unwrap();
    let mut child = Command::new("git")
        .arg("-C")
        .arg(world.path(folder))
        .args(["-c", "user.name=Ann", "-c", "user.email=ann@hub.local", "-c", "init.defaultBranch=main"])
        .args(["-c", "protocol.file.allow=always"])
        .args(arguments)
        .envs([("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CONFIG_SYSTEM", "/dev/null")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("git is installed, for the server");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Commits what lies in `folder`; the commit's id.
fn commit(world: &World, folder: &str, message: &str) -> String {
    git(world, folder, &["add", "--all"]);
    git(world, folder, &["commit", "--quiet", "--message", message]);
    git(world, folder, &["rev-parse", "HEAD"])
}

/// A repository `code` with a channel in its folder `channels/dev`, and two commits; the last one's id.
fn repository(world: &World) -> String {
    git(world, "code", &["init", "--quiet"]);
    world.write("code/channels/dev/src/main.py", "print(1)\n");
    commit(world, "code", "first");
    world.write("code/channels/dev/channel.toml", "version = \"1.4\"\nignore = [\"*.md\"]\n");
    world.write("code/channels/dev/src/lib/deep/all.bin", (0..=255).collect::<Vec<u8>>());
    world.write("code/channels/dev/src/notes.md", "not for devices\n");
    world.write("code/channels/dev/src/empty.txt", "");
    world.write("code/README.md", "not of the channel\n");
    commit(world, "code", "second")
}

/// What was asked of a server: method and path, and whether somebody logged in.
type Asked = Arc<Mutex<Vec<(String, bool)>>>;

/// git's own server behind HTTP, and perhaps TLS.
struct Hub {
    address: SocketAddr,
    scheme: &'static str,
    asked: Asked,
}

/// How a [`Hub`] answers.
#[derive(Clone, Default)]
struct Rules {
    /// Who may in, as `ann:secret`.
    login: Option<&'static str>,
    /// Where everything else has gone.
    moved: Option<String>,
}

impl Hub {
    /// Serves the world's folder. With `tls`, by the certificate `hub.pem`.
    fn start(world: &World, tls: bool, rules: Rules) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let config = tls.then(|| {
            let certificates = CertificateDer::pem_file_iter(world.path("hub.pem")).unwrap();
            let key = PrivateKeyDer::from_pem_file(world.path("hub.key")).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let config = config.unwrap().with_no_client_auth();
            Arc::new(config.with_single_cert(certificates.map(Result::unwrap).collect(), key).unwrap())
        });
        let (root, asked) = (world.text(""), Asked::default());
        let seen = asked.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, config) = (stream.unwrap(), config.clone());
                let (root, rules, seen) = (root.clone(), rules.clone(), seen.clone());
                thread::spawn(move || match config {
                    None => answer(&mut stream, &root, &rules, &seen),
                    Some(config) => {
                        let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
                        answer(&mut stream, &root, &rules, &seen);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        Hub { address, scheme: if tls { "https" } else { "http" }, asked }
    }

    fn secure(world: &World, rules: Rules) -> Hub {
        let ca = Authority::new(world, "ca");
        ca.server(world, "hub", &["127.0.0.1", "localhost"], Validity::Now);
        Hub::start(world, true, rules)
    }

    fn url(&self, login: &str, path: &str) -> String {
        format!("{}://{login}{}/{path}", self.scheme, self.address)
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<(String, bool)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// Answers one request, as a web server does that leaves the work to `git http-backend`.
fn answer(stream: &mut (impl Read + Write), root: &str, rules: &Rules, seen: &Asked) {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let mut words = lines[0].split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let authorization = header("authorization");
    seen.lock().unwrap().push((format!("{method} {target}"), authorization.is_some()));
    let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    let mut reply = |head: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.get_mut().write_all(&[head.as_bytes(), body].concat());
        let _ = stream.get_mut().flush();
    };
    if let Some(moved) = &rules.moved {
        return reply(&format!("301 Moved Permanently\r\nLocation: {moved}{target}"), b"");
    }
    let expected = rules.login.map(|login| format!("Basic {}", base64(login.as_bytes())));
    if expected.is_some() && authorization != expected {
        return reply("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"hub\"", b"");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut backend = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("REQUEST_METHOD", method)
        .env("CONTENT_TYPE", header("content-type").unwrap_or_default())
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("GIT_PROTOCOL", header("git-protocol").unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    backend.stdin.take().unwrap().write_all(&body).unwrap();
    let output = backend.wait_with_output().unwrap().stdout;
    let end = output.windows(4).position(|four| four == b"\r\n\r\n").expect("a CGI's answer");
    let head = String::from_utf8(output[..end].to_vec()).unwrap();
    let status = head.lines().find_map(|line| line.strip_prefix("Status: ")).unwrap_or("200 OK").to_owned();
    let others: String =
        head.lines().filter(|line| !line.starts_with("Status: ")).map(|line| format!("\r\n{line}")).collect();
    reply(&format!("{status}{others}"), &output[end + 4..]);
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = bytes.chunks(3).flat_map(|chunk| {
        let number =
            chunk.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        (0..4).map(move |at| match at <= chunk.len() {
            true => char::from(DIGITS[(number >> (18 - 6 * at) & 63) as usize]),
            false => '=',
        })
    });
    digits.collect()
}

/// A user's publisher, on a machine without git.
struct User<'a> {
    world: &'a World,
    broker: String,
    more: Vec<(&'a str, String)>,
}

impl<'a> User<'a> {
    fn new(world: &'a World, server: &Server) -> User<'a> {
        User { world, broker: server.url(), more: Vec::new() }
    }

    fn publish(&self, url: &str, more: &[&str]) -> Output {
        let usual = ["publish", "--git", url, "--channel", "dev", "--broker", &self.broker, "--json"];
        let (home, cache, ca) =
            (self.world.text("home"), self.world.text("cache"), self.world.text("ca.pem"));
        let mut variables = vec![("PATH", ""), ("HOME", &home), ("XDG_CACHE_HOME", &cache)];
        variables.extend([("GIT_SSL_CAINFO", &*ca), ("GIT_CONFIG_NOSYSTEM", "1")]);
        variables.extend(self.more.iter().map(|(name, value)| (*name, value.as_str())));
        run_with("mpypi", &[&usual[..], more].concat(), &variables)
    }

    fn with(&self, name: &'a str, value: &str) -> User<'a> {
        let more = [&self.more[..], &[(name, value.to_owned())]].concat();
        User { world: self.world, broker: self.broker.clone(), more }
    }
}

/// The channel's list, and the files that it names.
fn listed(server: &Server) -> (UpdateList, Vec<String>) {
    let mut client = Client::connect(server.address, "looks");
    let list = UpdateList::parse(&client.retained("mpypi/channels/dev").unwrap().payload).unwrap();
    let paths = list.packages().map(|(id, _)| id.to_string()).collect();
    (list, paths)
}

#[test]
fn a_folder_of_a_private_repository_is_published_over_https_without_git_and_its_commit_is_recorded() {
    let world = World::new();
    let server = Server::start(&world);
    let second = repository(&world);
    let hub = Hub::secure(&world, Rules { login: Some("ann:s3cret"), ..Rules::default() });
    let user = User::new(&world, &server);
    let url = hub.url("ann:s3cret@", "code/.git");
    let folder = ["--ref", "main", "channels/dev"];

    let done = user.publish(&url, &folder).expect_code(0);
    assert_eq!((&done.json()["commit"], &done.json()["version"]), (&second.as_str().into(), &"1.4".into()));
    let (list, paths) = listed(&server);
    assert_eq!(list.release().unwrap().commit(), Some(&*second));
    let names: Vec<_> = paths.iter().map(|id| id.split_whitespace().nth(1).unwrap_or(id)).collect();
    assert_eq!(paths.len(), 3, "{names:?}: what channel.toml ignores stays where it is");
    assert!(!done.stdout.contains("s3cret") && !done.stderr.contains("s3cret"));
    let asked = hub.asked();
    assert!(
        asked.iter().any(|(_, logged_in)| !logged_in),
        "nobody logs in before it is asked for: {asked:?}"
    );

    // The same commit again: nothing is fetched that was fetched before.
    let again = user.publish(&url, &folder).expect_code(0).json();
    assert_eq!((&again["unchanged"], &again["commit"]), (&true.into(), &second.as_str().into()));
    let posts = hub.asked().iter().filter(|(line, _)| line.starts_with("POST")).count();
    assert_eq!(posts, 1, "it is asked what there is, and no more");

    // Another commit, in which nothing of the channel changed; then one in which something did.
    world.write("code/README.md", "changed\n");
    commit(&world, "code", "third");
    let third = user.publish(&url, &folder).expect_code(0).json();
    assert_eq!((&third["unchanged"], &third["commit"]), (&true.into(), &second.as_str().into()));
    world.write("code/channels/dev/src/main.py", "print(2)\n");
    let fourth = commit(&world, "code", "fourth");
    let changed = user.publish(&url, &folder).expect_code(0).json();
    assert_eq!((&changed["commit"], &changed["packages"]["sent"]), (&fourth.as_str().into(), &1.into()));

    // Only the last commit ever came: no history.
    let place = kept(&world);
    let objects = ["cat-file", "--batch-all-objects", "--batch-check"];
    let objects = Command::new("git").arg("-C").arg(&place).args(objects).output().unwrap().stdout;
    let commits =
        String::from_utf8(objects).unwrap().lines().filter(|line| line.contains(" commit ")).count();
    assert_eq!(commits, 3, "the second, the third and the fourth");
    assert!(!std::fs::read_to_string(place.join("config")).unwrap().contains("s3cret"));

    // What is kept says where it is from; what is put back or passed on still does.
    let broker = ["--broker", &server.url()];
    let told = |arguments: &[&str]| run("mpypi", &[arguments, &broker].concat()).expect_code(0).stdout;
    let log: serde_json::Value = serde_json::from_str(&told(&["log", "dev", "--json"])).unwrap();
    let commits: Vec<_> =
        log["lists"].as_array().unwrap().iter().map(|list| list["commit"].clone()).collect();
    assert_eq!(commits, [fourth.as_str(), &second]);
    assert!(told(&["log", "dev"]).contains(&format!("of commit {}", &fourth[..12])));
    assert!(told(&["status", "dev"]).contains(&format!("of commit {}", &fourth[..12])));
    assert!(told(&["verify", "dev"]).contains(&format!("made of commit {fourth}")));
    told(&["rollback", "dev", "--to", "1"]);
    assert_eq!(listed(&server).0.release().unwrap().commit(), Some(&*second));
}

/// What is kept of the one repository that was fetched.
fn kept(world: &World) -> PathBuf {
    let cache = world.path("cache/mpypi/git");
    std::fs::read_dir(cache).unwrap().next().unwrap().unwrap().path().join("repository")
}

#[test]
fn what_is_kept_of_a_repository_is_fetched_again_when_it_is_damaged() {
    let world = World::new();
    let server = Server::start(&world);
    repository(&world);
    let hub = Hub::secure(&world, Rules::default());
    let user = User::new(&world, &server);
    let publish = || user.publish(&hub.url("", "code/.git"), &["channels/dev"]);
    publish().expect_code(0);
    for spoil in ["pack", "idx", "HEAD", "everything"] {
        let place = kept(&world);
        match spoil {
            "everything" => {
                std::fs::remove_dir_all(&place).unwrap();
                std::fs::write(&place, "a file").unwrap();
            }
            "HEAD" => std::fs::write(place.join("HEAD"), "nonsense").unwrap(),
            ending => {
                for entry in std::fs::read_dir(place.join("objects/pack")).unwrap() {
                    let path = entry.unwrap().path();
                    if path.extension().is_some_and(|found| found == ending) {
                        let bytes = std::fs::read(&path).unwrap();
                        std::fs::remove_file(&path).unwrap();
                        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
                    }
                }
            }
        }
        assert_eq!(publish().expect_code(0).json()["unchanged"], true, "{spoil}");
    }
}

#[test]
fn who_may_not_read_a_repository_hears_it_and_credentials_come_from_where_git_has_them() {
    let world = World::new();
    let server = Server::start(&world);
    repository(&world);
    let hub = Hub::secure(&world, Rules { login: Some("ann:s3cret"), ..Rules::default() });
    let user = User::new(&world, &server);
    let plain = hub.url("", "code/.git");
    let refused = |output: Output, text: &str| {
        let stderr = output.expect_code(1).stderr;
        assert!(stderr.contains(text) && stderr.contains("hint: "), "{stderr}");
        assert!(!stderr.contains("s3cret") && !stderr.contains("wr0ng"), "{stderr}");
    };
    refused(user.publish(&plain, &[]), "no credentials were given");
    refused(user.publish(&hub.url("ann:wr0ng@", "code/.git"), &[]), "these credentials are refused");
    refused(user.publish(&hub.url("ann:s3cret@", "other/.git"), &[]), "the server answers 404");
    let unknown = user.publish(&hub.url("ann:s3cret@", "code/.git"), &["--ref", "mian"]);
    refused(unknown, "has no branch, tag or commit `mian`");

    let named = hub.url("ann@", "code/.git");
    user.with("MPYPI_GIT_TOKEN", "s3cret").publish(&named, &["channels/dev"]).expect_code(0);
    refused(user.with("MPYPI_GIT_TOKEN", "wr0ng").publish(&named, &[]), "these credentials are refused");
    let netrc = world.write("netrc", "machine 127.0.0.1 login ann password s3cret\n");
    user.with("NETRC", netrc.to_str().unwrap()).publish(&plain, &["channels/dev"]).expect_code(0);
    // As git asks a helper; that one is a shell script, and finds what it needs.
    let helper =
        world.write("helper", "#!/bin/sh\n[ \"$1\" = get ] && printf 'username=ann\\npassword=s3cret\\n'\n");
    Command::new("chmod").arg("+x").arg(&helper).status().unwrap();
    let config = format!("[credential]\n\thelper = {}\n", helper.display());
    let config = world.write("gitconfig", config);
    let helped = user.with("GIT_CONFIG_GLOBAL", config.to_str().unwrap()).with("PATH", "/usr/bin:/bin");
    helped.publish(&plain, &["channels/dev"]).expect_code(0);

    // A server that nobody vouches for gets nothing.
    let stranger = user.with("GIT_SSL_CAINFO", world.path("hub.pem").to_str().unwrap());
    let said = stranger.publish(&hub.url("ann:s3cret@", "code/.git"), &[]).expect_code(1).stderr;
    assert!(said.contains("cannot be fetched") && !said.contains("s3cret"), "{said}");
    // Nor does who listens to a line in clear.
    let open = Hub::start(&world, false, Rules { login: Some("ann:s3cret"), ..Rules::default() });
    refused(user.publish(&open.url("ann:s3cret@", "code/.git"), &[]), "over plain http");
    assert!(open.asked().iter().all(|(_, logged_in)| !logged_in));
}

#[test]
fn a_repository_that_moved_is_found_and_strangers_hear_no_password() {
    let world = World::new();
    let server = Server::start(&world);
    repository(&world);
    let private = Hub::secure(&world, Rules { login: Some("ann:s3cret"), ..Rules::default() });
    let public = Hub::start(&world, true, Rules::default());
    let user = User::new(&world, &server);
    let moved = |to: String| Hub::start(&world, true, Rules { moved: Some(to), ..Rules::default() });
    // To another host: what is given for one is not told to the other.
    let elsewhere = private.url("", "").replace("127.0.0.1", "localhost");
    let old = moved(elsewhere.trim_end_matches('/').to_owned());
    let said = user.publish(&old.url("ann:s3cret@", "code/.git"), &["channels/dev"]).expect_code(1).stderr;
    assert!(said.contains("no credentials were given"), "{said}");
    assert!(private.asked().iter().all(|(_, logged_in)| !logged_in));
    let old = moved(public.url("", "").trim_end_matches('/').to_owned());
    user.publish(&old.url("", "code/.git"), &["channels/dev"]).expect_code(0);
    assert!(old.asked().iter().all(|(line, _)| line.starts_with("GET")), "what follows is asked where it is");
    // Out of TLS, nobody follows.
    let open = Hub::start(&world, false, Rules::default());
    let old = moved(open.url("", "").trim_end_matches('/').to_owned());
    let said = user.publish(&old.url("", "code/.git"), &["channels/dev"]).expect_code(1).stderr;
    assert!(said.contains("cannot be fetched"), "{said}");
}

#[test]
fn a_repository_of_this_machine_is_read_where_it_is_at_any_branch_tag_or_commit() {
    let world = World::new();
    let server = Server::start(&world);
    let second = repository(&world);
    let user = User::new(&world, &server);
    let first = git(&world, "code", &["rev-parse", "HEAD~1"]);
    git(&world, "code", &["tag", "--annotate", "v1", "--message", "one", &first]);
    git(&world, ".", &["clone", "--quiet", "--bare", "code", "bare.git"]);
    // What is not committed is not there.
    world.write("code/channels/dev/src/main.py", "print('not yet')\n");
    let (here, bare) = (world.text("code"), world.text("bare.git"));
    let file = format!("file://{bare}");
    for (url, reference, expected) in [
        (&here, None, &second),
        (&here, Some("v1"), &first),
        (&bare, Some("main"), &second),
        (&file, Some(&*first), &first),
        (&bare, Some("refs/tags/v1"), &first),
    ] {
        let named: Vec<&str> = reference.iter().flat_map(|name| ["--ref", *name]).collect();
        let done = user.publish(url, &[&named[..], &["channels/dev"]].concat()).expect_code(0).json();
        assert_eq!(done["commit"], expected.as_str(), "{url} {reference:?}");
    }
    // A folder that nobody named is the whole, called as its repository.
    let whole = ["publish", "--git", &here, "--broker", &server.url(), "--dry-run", "--json"];
    assert_eq!(run("mpypi", &whole).expect_code(0).json()["channel"], "code");

    let says = |arguments: &[&str], text: &str, hint: &str| {
        let stderr = user.publish(arguments[0], &arguments[1..]).expect_code(1).stderr;
        assert!(stderr.contains(text) && stderr.contains(hint), "{stderr}");
    };
    says(&[&here, "--ref", "mian"], "has no branch, tag or commit `mian`", "hint: there is `main`");
    says(&[&here, "--ref", &"0".repeat(40)], "has no branch, tag or commit", "hint: ");
    says(&[&here, "channels/none"], &format!("commit {second} has no folder `channels/none`"), "");
    says(&[&here, "../code"], "has no folder", "");
    says(&[&world.text("data")], "is no git repository", "hint: ");
    git(&world, "new", &["init", "--quiet"]);
    says(&[&world.text("new")], "is empty", "hint: ");
    let ssh = ["publish", "--git", "git@hub.local:code.git", "--channel", "dev"];
    let refused = run("mpypi", &ssh).expect_code(2).stderr;
    assert!(refused.contains("use its https:// address"), "{refused}");
    assert!(run("mpypi", &["publish"]).expect_code(2).stderr.contains("FOLDER"));
}

#[test]
fn what_git_only_points_to_is_left_out_by_name_and_what_leads_out_of_the_folder_is_written_nowhere() {
    let world = World::new();
    let server = Server::start(&world);
    repository(&world);
    let user = User::new(&world, &server);
    let here = world.text("code");
    std::os::unix::fs::symlink("/etc/passwd", world.path("code/channels/dev/src/users")).unwrap();
    git(&world, "other", &["init", "--quiet"]);
    world.write("other/x.py", "x = 1\n");
    commit(&world, "other", "x");
    git(&world, "code", &["submodule", "--quiet", "add", &world.text("other"), "channels/dev/src/other"]);
    commit(&world, "code", "links");
    let done = user.publish(&here, &["channels/dev"]).expect_code(0);
    for warning in ["`src/users` is a symbolic link: left out", "`src/other` is a submodule"] {
        assert!(done.stderr.contains(warning), "{}", done.stderr);
    }
    assert_eq!(listed(&server).1.len(), 3);

    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    world.write("code/channels/dev/src/font.bin", pointer);
    commit(&world, "code", "a pointer");
    let refused = user.publish(&here, &["channels/dev"]).expect_code(1).stderr;
    assert!(
        refused.contains("git LFS, `src/font.bin` among them") && refused.contains("git lfs pull"),
        "{refused}"
    );

    git(&world, "deep", &["init", "--quiet"]);
    world.write(&format!("deep/{}x.py", "a/".repeat(70)), "x = 1\n");
    commit(&world, "deep", "deep");
    let refused = user.publish(&world.text("deep"), &[]).expect_code(1).stderr;
    assert!(refused.contains("more than 64 folders in each other"), "{refused}");

    // Trees that git itself would not write.
    let blob = git_with(&world, "code", &["hash-object", "-w", "--stdin"], b"print('evil')\n");
    let id: Vec<u8> = (0..20).map(|at| u8::from_str_radix(&blob[2 * at..2 * at + 2], 16).unwrap()).collect();
    for name in ["..", ".git", "a/b", "."] {
        let entry = [format!("100644 {name}\0").as_bytes(), &id].concat();
        let hash = ["hash-object", "-t", "tree", "-w", "--literally", "--stdin"];
        let tree = git_with(&world, "code", &hash, &entry);
        let bad = git(&world, "code", &["commit-tree", &tree, "-m", "bad"]);
        let refused = user.publish(&here, &["--ref", &bad]).expect_code(1).stderr;
        assert!(refused.contains(&format!("commit {bad}")), "{name}: {refused}");
    }
}
