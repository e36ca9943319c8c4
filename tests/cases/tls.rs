//! Publisher and agents by TLS: whom they trust, whom they do not, and what they say about it.

use std::net::TcpListener;

use mpypi_protocol::node::State;
use mpypi_tests::{Authority, Client, Kind, Output, Running, Secure, Server, Validity, World, run, run_with};

const HERE: [&str; 2] = ["localhost", "127.0.0.1"];

/// A channel, a CA `ca` and its certificate for a broker on this machine.
fn world() -> (World, Authority) {
    let world = World::new();
    world.write("dev/src/main.py", "print(1)\n");
    let ca = Authority::new(&world, "ca");
    ca.server(&world, "broker", &HERE, Validity::Now);
    (world, ca)
}

fn publish(world: &World, broker: &str, more: &[&str]) -> Output {
    run("mpypi", &[&["publish", &world.text("dev"), "--broker", broker], more].concat())
}

fn fleet(world: &World, broker: &str, time: &str, more: &[&str]) -> Running {
    let dir = world.text("devices");
    let arguments =
        ["fleet", "--broker", broker, "--channel", "dev", "--nodes", "3", "--dir", &dir, "--for", time];
    Running::start("mpypi-agent", &[&arguments[..], &["--confirm-after", "10ms"], more].concat())
}

fn each(test: impl Fn(Kind)) {
    Secure::KINDS.into_iter().for_each(test);
}

#[test]
fn a_release_reaches_devices_by_tls_whatever_the_broker_is_called() {
    each(|kind| {
        let (world, ca) = world();
        let broker = Secure::start(kind, &world, None);
        let ca = ca.pem(&world);
        world.write("dev/src/big.bin", vec![7; 900_000]);
        let _ = publish(&world, &broker.url("localhost"), &["--ca", &ca]).expect_code(0);
        let devices = fleet(&world, &broker.url("127.0.0.1"), "60s", &["--ca", &ca, "--releases", "1"]);
        let _ = devices.wait().expect_code(0);
        for n in 1..=3 {
            assert_eq!(world.files(&format!("devices/device-{n}")), world.files("dev/src"));
        }
        // The environment does as well, and a warning about passwords is for others.
        let url = broker.url("ann:secret@localhost");
        let status =
            run_with("mpypi", &["status", "dev", "--json"], &[("MPYPI_BROKER", &url), ("MPYPI_CA", &ca)]);
        let status = status.expect_code(0);
        assert_eq!(status.json()["nodes"].as_array().unwrap().len(), 3);
        assert_eq!(status.stderr, "");
    });
}

#[test]
fn the_systems_cas_are_trusted_unless_another_is_named() {
    each(|kind| {
        let (world, ca) = world();
        let broker = Secure::start(kind, &world, None);
        let (ours, other) = (ca.pem(&world), Authority::new(&world, "other").pem(&world));
        let url = broker.url("localhost");
        let nothing = world.text("devices");
        std::fs::create_dir(&nothing).unwrap();
        let system = |roots: &str, more: &[&str]| {
            let arguments = [&["status", "--broker", &url], more].concat();
            let places = [("SSL_CERT_FILE", roots), ("SSL_CERT_DIR", &nothing)];
            run_with("mpypi", &arguments, &places)
        };
        let _ = system(&ours, &[]).expect_code(0);
        let named = system(&ours, &["--ca", &other]).expect_code(1).stderr;
        assert!(named.contains("a CA that is not trusted here"), "{named}");
        assert!(
            named.contains("hint: `") && named.contains("other.pem` is not the CA that made it"),
            "{named}"
        );
        let unknown = system(&other, &[]).expect_code(1).stderr;
        assert!(unknown.contains("hint: give the broker's CA with `--ca`"), "{unknown}");
        let none = system("/dev/null", &[]).expect_code(1).stderr;
        assert!(none.contains("no CAs to trust"), "{none}");
    });
}

/// Both programs fail with `message` and `hint`, and the broker got nothing.
#[track_caller]
fn fails(world: &World, broker: &Server, url: &str, more: &[&str], message: &str, hint: &str) {
    let devices = fleet(world, url, "300ms", more);
    for output in [publish(world, url, more), devices.wait()] {
        let said = output.expect_code(1).stderr;
        assert!(said.contains(message), "expected `{message}`: {said}");
        assert!(said.contains(&format!("hint: {hint}")), "expected `hint: {hint}`: {said}");
    }
    let mut checker = Client::connect(broker.address, "checker");
    // Ours has an answer for every channel.
    let found = checker.retained("mpypi/channels/dev");
    assert!(found.is_none_or(|found| found.payload == b"[]"));
}

#[test]
fn a_broker_that_cannot_be_trusted_gets_nothing_and_people_are_told_why() {
    each(|kind| {
        let (world, ca) = world();
        let trust = ["--ca", &ca.pem(&world)];
        let with = |hosts: &[&str], validity, message: &str, hint: &str| {
            ca.server(&world, "broker", hosts, validity);
            let broker = Secure::start(kind, &world, None);
            fails(&world, &broker.server, &broker.url("localhost"), &trust, message, hint);
        };
        with(
            &["hub.example", "10.0.0.1"],
            Validity::Now,
            "its certificate is for `hub.example`, `10.0.0.1`, not for `localhost`",
            "connect to the broker by a name",
        );
        with(
            &[],
            Validity::Now,
            "is for no host at all",
            "make it a certificate with its host in subjectAltName",
        );
        with(&HERE, Validity::Past, "its certificate has expired", "renew the broker's certificate");
        with(&HERE, Validity::Future, "its certificate is not valid yet", "is this machine's clock wrong?");
        // As people make them with one line of openssl: a CA's own certificate.
        std::fs::copy(world.path("ca.pem"), world.path("broker.pem")).unwrap();
        std::fs::copy(world.path("ca.key"), world.path("broker.key")).unwrap();
        let broker = Secure::start(kind, &world, None);
        let (message, hint) = ("its certificate cannot be used", "a broker needs a version 3 certificate");
        fails(&world, &broker.server, &broker.url("localhost"), &trust, message, hint);
    });
}

#[test]
fn a_broker_that_wants_certificates_gets_them_and_says_when_they_are_wrong() {
    each(|kind| {
        let (world, ca) = world();
        ca.client(&world, "kitchen");
        Authority::new(&world, "other").client(&world, "stranger");
        let trust = ca.pem(&world);
        let broker = Secure::start(kind, &world, Some(&trust));
        let url = broker.url("localhost");
        let [kitchen, stranger] = ["kitchen", "stranger"]
            .map(|name| [world.text(&format!("{name}.pem")), world.text(&format!("{name}.key"))]);
        let shows =
            |[cert, key]: &[String; 2]| ["--ca", &trust, "--cert", cert, "--key", key].map(str::to_owned);
        let [kitchen, stranger] = [shows(&kitchen), shows(&stranger)];
        let [kitchen, stranger] =
            [&kitchen, &stranger].map(|arguments| arguments.each_ref().map(String::as_str));

        fails(
            &world,
            &broker.server,
            &url,
            &["--ca", &trust],
            "it wants a client certificate",
            "give one with `--cert`",
        );
        let (message, hint) =
            ("it does not accept our client certificate", "give one with `--cert` and `--key`");
        fails(&world, &broker.server, &url, &stranger, message, hint);
        // At ours the certificate makes the device that node; a publisher logs in beside it.
        let login = match kind {
            Kind::Ours => {
                let data = world.text("data");
                let add = ["user", "add", "ci", "--role", "publisher", "--token", "--data", &data];
                let mut anyone = Client::connect(broker.server.address, "anyone");
                let token = run("mpypi-broker", &add).expect_code(0).stdout.trim().to_owned();
                // The broker has noticed.
                assert!(anyone.is_closed());
                token
            }
            Kind::Mosquitto => "anything".to_owned(),
        };
        let _ = publish(&world, &broker.url(&format!("ci:{login}@localhost")), &kitchen).expect_code(0);
        let root = world.text("kitchen");
        let device = ["run", "--broker", &url, "--node", "kitchen", "--root", &root, "--once"];
        let _ = run("mpypi-agent", &[&device[..], &kitchen].concat()).expect_code(0);
        assert_eq!(world.files("kitchen"), world.files("dev/src"));
    });
}

#[test]
fn tls_spoken_to_a_plain_port_and_plain_to_a_tls_port_are_told_apart_from_a_dead_broker() {
    each(|kind| {
        let (world, ca) = world();
        let broker = Secure::start(kind, &world, None);
        let trust = ["--ca", &ca.pem(&world)];
        let plain_as_tls = broker.server.url().replace("mqtt://", "mqtts://");
        fails(
            &world,
            &broker.server,
            &plain_as_tls,
            &trust,
            "TLS",
            "if that port speaks no TLS, write `mqtt://`",
        );
        let tls_as_plain = broker.url("localhost").replace("mqtts://", "mqtt://");
        let said = publish(&world, &tls_as_plain, &[]).expect_code(1).stderr;
        assert!(said.contains("`mqtts://` instead of `mqtt://`"), "{said}");
    });
}

#[test]
fn a_port_that_speaks_something_else_or_nothing_is_not_waited_for() {
    use std::io::{Read, Write};
    let (world, ca) = world();
    let trust = ["--ca", &ca.pem(&world)];
    let speaking = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtts://{}", speaking.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = speaking.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let said = publish(&world, &url, &trust).expect_code(1).stderr;
    assert!(said.contains("it does not speak TLS there"), "{said}");

    // A TLS server's word for what it does not understand.
    let alerting = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtt://{}", alerting.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = alerting.accept().unwrap();
        stream.write_all(&[0x15, 3, 3, 0, 2, 2, 50]).unwrap();
        stream.read_to_end(&mut Vec::new()).ok();
    });
    let said = publish(&world, &url, &[]).expect_code(1).stderr;
    assert!(said.contains("it speaks TLS there") && said.contains("hint: write `mqtts://`"), "{said}");

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtts://{}", silent.local_addr().unwrap());
    let said = publish(&world, &url, &trust).expect_code(1).stderr;
    assert!(said.contains("no answer for 5 s"), "{said}");
}

#[test]
fn a_file_that_cannot_be_used_is_named_before_anything_is_sent() {
    let (world, ca) = world();
    ca.client(&world, "kitchen");
    ca.client(&world, "cellar");
    world.write("empty.pem", "");
    world.write("broken.pem", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n");
    let file = |name: &str| world.text(name);
    let says = |arguments: &[&str], message: &str, hint: &str| {
        // Nobody listens there: this is said before it is found out.
        let url = "mqtts://127.0.0.1:1";
        for output in [publish(&world, url, arguments), fleet(&world, url, "60s", arguments).wait()] {
            let said = output.expect_code(1).stderr;
            assert!(
                said.contains(message) && said.contains(hint),
                "expected `{message}` and `{hint}`: {said}"
            );
        }
    };
    says(&["--ca", &file("nowhere.pem")], "cannot read `", "nowhere.pem`: No such file");
    says(&["--ca", &file("empty.pem")], "empty.pem` holds no certificate", "hint: certificates are expected");
    says(&["--ca", &file("broken.pem")], "broken.pem` is not in PEM form", "hint: certificates are expected");
    let (trust, cert) = (file("ca.pem"), file("kitchen.pem"));
    let ours = ["--ca", &trust, "--cert", &cert, "--key"];
    says(
        &[&ours[..], &[&cert]].concat(),
        "kitchen.pem` holds no private key",
        "hint: the key must be there unencrypted",
    );
    let other = file("cellar.key");
    says(
        &[&ours[..], &[&other]].concat(),
        "cellar.key` are no certificate with its key",
        "hint: give the key that",
    );
    let _ = publish(&world, "mqtts://127.0.0.1:1", &["--cert", &cert]).expect_code(2);
}

#[test]
fn a_password_in_clear_to_another_machine_is_warned_of_once() {
    let (world, _) = world();
    // Nobody has this address (RFC 5737), so nobody answers.
    let devices = fleet(&world, "mqtt://ann:secret@192.0.2.1:1", "300ms", &[]).wait().expect_code(1);
    let warning = "warning: the password travels in clear to mqtt://192.0.2.1:1";
    assert_eq!(devices.stderr.matches(warning).count(), 1, "{}", devices.stderr);
    assert!(!devices.stderr.contains("secret"));
}

#[test]
fn devices_come_back_to_a_broker_that_was_restarted_with_a_renewed_certificate() {
    each(|kind| {
        let (world, ca) = world();
        let broker = Secure::start(kind, &world, None);
        let (url, trust) = (broker.url("localhost"), ca.pem(&world));
        let _ = publish(&world, &url, &["--ca", &trust]).expect_code(0);
        let devices = fleet(&world, &url, "60s", &["--ca", &trust, "--releases", "2"]);
        let mut reader = Client::connect(broker.server.address, "reader");
        reader.subscribe("mpypi/nodes/+/state", 1);
        let mut idle = std::collections::BTreeSet::new();
        while idle.len() < 3 {
            let message = reader.message().unwrap();
            let state = State::parse(&message.payload).unwrap();
            if state.sequence == Some(1) && state.phase.to_string() == "idle" {
                idle.insert(message.topic);
            }
        }
        ca.server(&world, "broker", &HERE, Validity::Now);
        let broker = broker.restart(&world);
        world.write("dev/src/main.py", "print(2)\n");
        // mosquitto kept nothing.
        let _ =
            publish(&world, &broker.url("localhost"), &["--ca", &trust, "--sequence", "2"]).expect_code(0);
        let _ = devices.wait().expect_code(0);
        for n in 1..=3 {
            assert_eq!(world.files(&format!("devices/device-{n}")), world.files("dev/src"));
        }
    });
}
