//! Tables: what was seen, and what that means.

use std::collections::BTreeMap;

use super::{super::engines::recognise, *};

/// What is seen of a broker that is as it should be.
fn fine() -> Observations {
    Observations {
        addresses: vec![address("a")],
        examined: 0,
        greeting: Some(Greeting::default()),
        sys: BTreeMap::new(),
        plain: Fate::Kept,
        dots: Fate::Kept,
        spaces: Fate::Kept,
        wildcard: Wildcard { there: 24, came: 24, accepted: true },
        live: Live::Came { qos: 1 },
        largest: Largest { kept: PACKAGE, limit: PACKAGE, lost: None },
        expiry: Some(Expiry { asked: 600, left: Some(597), kept: true, gone: true }),
        cleared: Cleared::Gone,
        denied: vec![(Mqtt::Five, refused())],
        agreement: None,
        clock: Some(0),
    }
}

fn address(host: &str) -> Address {
    Address { url: format!("mqtt://{host}"), four: None, five: None }
}

fn shut(host: &str) -> Address {
    let reason = Some("no answer for 5 s".to_owned());
    Address { four: reason.clone(), five: reason, ..address(host) }
}

fn refused() -> Denied {
    Denied::Refused { reason: "not authorized (0x87)".into() }
}

fn closed() -> Fate {
    Fate::Closed { reason: "the broker closed it".into() }
}

/// The row of one check.
fn row(seen: &Observations, check: Check) -> Row {
    let engine = recognise(seen).map(|recognised| recognised.engine);
    let row = judge(seen, engine).into_iter().find(|row| row.check == check);
    row.unwrap_or_else(|| panic!("no row of {}", check.name()))
}

#[test]
fn a_broker_that_is_as_it_should_be_is_fit_without_a_hint() {
    let rows = judge(&fine(), None);
    assert!(rows.iter().all(|row| row.verdict == Verdict::Ok && row.hint.is_none()), "{rows:#?}");
    assert_eq!(expect_fit("mqtt://a", &rows), Ok(()));
    let names: Vec<&str> = rows.iter().map(|row| row.check.name()).collect();
    let expected = "mqtt-3.1.1 mqtt-5 greeting retained bytes qos-1 dots spaces wildcard largest expiry clear denied clock";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn each_thing_that_is_seen_has_its_verdict() {
    use Check::{
        Bytes, Clear, Clock, Confirmed, Denied, Dots, Expiry, Five, Four, Greeting, Largest, Retained,
        Spaces, Wildcard,
    };
    use Verdict::{No, Ok, Unknown, Weak};
    type Case = (&'static str, fn(&mut Observations), Check, Verdict, &'static str);
    let cases: &[Case] = &[
        ("5 alone", |seen| seen.addresses[0].four = Some("no".into()), Four, No, "no"),
        ("3.1.1 alone", |seen| seen.addresses[0].five = Some("no".into()), Five, Weak, "not spoken (no)"),
        (
            "a small one",
            |seen| greets(seen).maximum_packet_size = Some(65_536),
            Greeting,
            Ok,
            "up to 64.0 KiB",
        ),
        (
            "no retain",
            |seen| greets(seen).retain_available = Some(false),
            Greeting,
            No,
            "no retained messages",
        ),
        ("QoS 0", |seen| greets(seen).maximum_qos = Some(0), Greeting, No, "no QoS 1"),
        (
            "no wildcards",
            |seen| greets(seen).wildcard_subscription_available = Some(false),
            Greeting,
            Weak,
            "no wildcards",
        ),
        (
            "nothing shared",
            |seen| greets(seen).shared_subscription_available = Some(false),
            Greeting,
            Ok,
            "no shared subscriptions",
        ),
        ("dropped", |seen| seen.plain = Fate::Dropped, Retained, No, "acknowledged, and is not there"),
        (
            "refused",
            |seen| seen.plain = Fate::Refused { reason: "not authorized (0x87)".into() },
            Retained,
            No,
            "this user may not write packages: not authorized (0x87)",
        ),
        ("closed", |seen| seen.plain = closed(), Retained, No, "the end of the connection"),
        ("unreadable", |seen| seen.plain = Fate::Unreadable, Retained, No, "may not read packages"),
        ("silent", |seen| seen.plain = Fate::Silent, Retained, No, "not answered in time"),
        (
            "renamed",
            |seen| seen.plain = Fate::Renamed { topic: "x".into() },
            Retained,
            No,
            "under another topic, `x`",
        ),
        ("garbled", |seen| seen.plain = Fate::Garbled, Bytes, No, "not what was published"),
        ("garbled, and kept", |seen| seen.plain = Fate::Garbled, Retained, Ok, "see below"),
        ("QoS 0 out", |seen| seen.live = Live::Came { qos: 0 }, Confirmed, Weak, "delivered at QoS 0"),
        ("deaf", |seen| seen.live = Live::Missing { reason: None }, Confirmed, No, "does not get"),
        (
            "dots",
            |seen| seen.dots = Fate::Renamed { topic: "main/py".into() },
            Dots,
            No,
            "comes back as `main/py`",
        ),
        ("dots refused", |seen| seen.dots = closed(), Dots, No, "the connection ends"),
        ("spaces", |seen| seen.spaces = closed(), Spaces, Weak, "the connection ends"),
        ("no filter", |seen| seen.wildcard.accepted = false, Wildcard, Weak, "the filter is refused"),
        ("nothing", |seen| seen.wildcard.came = 0, Wildcard, No, "none of 24"),
        ("something", |seen| seen.wildcard.came = 9, Wildcard, Weak, "9 of 24"),
        ("nothing there", |seen| seen.wildcard = nothing_wild(), Wildcard, Ok, "all 0"),
        ("small", |seen| lose(seen, 100_000, 110_000), Largest, Weak, "97.7 KiB come back; 107.4 KiB: "),
        ("tiny", |seen| lose(seen, 1000, 1024), Largest, No, "1000 B come back"),
        ("enough", |seen| lose(seen, PACKAGE, PACKAGE + 1), Largest, Ok, "8.0 MiB come back"),
        ("no end", |seen| seen.expiry = None, Expiry, Unknown, "could not be tried"),
        ("gone at once", |seen| ends(seen).kept = false, Expiry, Weak, "gone at once"),
        ("stays", |seen| ends(seen).gone = false, Expiry, Weak, "still there"),
        ("says nothing", |seen| ends(seen).left = None, Expiry, Weak, "do not say"),
        ("stands still", |seen| ends(seen).left = Some(600), Expiry, Weak, "does not count down"),
        ("stays for ever", |seen| seen.cleared = Cleared::Still, Clear, No, "still there"),
        (
            "no clearing",
            |seen| seen.cleared = Cleared::Refused { reason: "no".into() },
            Clear,
            No,
            "not taken: no",
        ),
        (
            "an admin",
            |seen| seen.denied = vec![(Mqtt::Five, super::Denied::Nowhere)],
            Denied,
            Unknown,
            "cannot tell",
        ),
        (
            "blind",
            |seen| seen.denied = vec![(Mqtt::Five, super::Denied::Unknown)],
            Denied,
            Unknown,
            "may not read",
        ),
        (
            "acknowledged",
            |seen| seen.denied = vec![(Mqtt::Four, super::Denied::Dropped), (Mqtt::Five, refused())],
            Denied,
            Weak,
            "3.1.1: acknowledged all the same, and does not come back; 5: refused (not authorized (0x87))",
        ),
        ("no clock", |seen| seen.clock = None, Clock, Unknown, "does not say"),
        ("fast", |seen| seen.clock = Some(3600), Clock, Weak, "3600 s ahead of ours"),
        ("slow", |seen| seen.clock = Some(-61), Clock, Weak, "61 s behind ours"),
    ];
    for (name, change, check, verdict, why) in cases {
        let mut seen = fine();
        change(&mut seen);
        let row = row(&seen, *check);
        assert_eq!(row.verdict, *verdict, "{name}: {row:?}");
        assert!(row.why.contains(why), "{name}: {row:?}");
        // What is not as it should be has a way out.
        let has_way = row.hint.is_some() || !matches!(verdict, Verdict::No | Verdict::Weak);
        assert!(has_way, "{name}: {row:?}");
        let is_fit = expect_fit("mqtt://a", &judge(&seen, None)).is_ok();
        let is_unfit = judge(&seen, None).iter().any(|row| row.verdict == Verdict::No);
        assert_eq!(is_fit, !is_unfit, "{name}");
    }
}

fn greets(seen: &mut Observations) -> &mut Greeting {
    seen.greeting.get_or_insert_with(Greeting::default)
}

fn ends(seen: &mut Observations) -> &mut Expiry {
    seen.expiry.as_mut().unwrap()
}

fn nothing_wild() -> Wildcard {
    Wildcard { there: 0, came: 0, accepted: true }
}

fn lose(seen: &mut Observations, kept: u64, lost: u64) {
    seen.largest = Largest { kept, limit: 2 * PACKAGE, lost: Some((lost, closed())) };
}

#[test]
fn a_broker_that_says_itself_how_large_packets_may_be_needs_no_flag() {
    let mut seen = fine();
    lose(&mut seen, 100_000, 110_000);
    greets(&mut seen).maximum_packet_size = Some(105_000);
    let said = row(&seen, Check::Largest).hint.unwrap();
    assert!(said.starts_with("larger packages go out in chunks"), "{said}");
    greets(&mut seen).maximum_packet_size = Some(200_000);
    assert!(row(&seen, Check::Largest).hint.unwrap().contains("--max-packet"), "it takes less than it says");
}

#[test]
fn where_nothing_is_kept_the_rest_is_not_judged() {
    let seen = Observations {
        plain: Fate::Dropped,
        dots: Fate::Untried,
        spaces: Fate::Untried,
        live: Live::Untried,
        expiry: None,
        cleared: Cleared::Untried,
        ..fine()
    };
    let unfit = expect_fit("mqtt://a", &judge(&seen, None)).unwrap_err();
    assert_eq!(unfit.failed, ["retained"]);
    for check in
        [Check::Dots, Check::Spaces, Check::Confirmed, Check::Wildcard, Check::Largest, Check::Expiry]
    {
        let row = row(&seen, check);
        assert_eq!((row.verdict, &*row.why), (Verdict::Unknown, UNTRIED), "{}", check.name());
    }
}

/// What three addresses show of each other, but for those pairs: at which, of which.
fn sights(missing: &[(usize, usize)]) -> Agreement {
    let pairs = (0..3).flat_map(|at| (0..3).filter(move |of| *of != at).map(move |of| (at, of)));
    Agreement {
        within: 10_000,
        published: (0..3).map(|number| (number, Fate::Kept)).collect(),
        seen: pairs.map(|pair| (pair, (!missing.contains(&pair)).then_some(7 + pair.0 as u64))).collect(),
    }
}

#[test]
fn the_address_that_shows_something_else_is_named() {
    let three = || Observations { addresses: ["a", "b", "c"].map(address).into(), ..fine() };
    type Case = (&'static [(usize, usize)], Verdict, &'static str);
    let cases: &[Case] = &[
        (&[], Verdict::Ok, "each of 3 shows what is published at the others, after 9 ms at most"),
        (
            &[(1, 0), (1, 2)],
            Verdict::No,
            "mqtt://b is stale: it shows nothing of what is published at the others (waited for 10 s)",
        ),
        (&[(2, 0)], Verdict::No, "mqtt://c does not show what is published at mqtt://a (waited"),
        // What is published at one gets nowhere.
        (
            &[(0, 2), (1, 2)],
            Verdict::No,
            "mqtt://a does not show what is published at mqtt://c; mqtt://b does not show what is published at mqtt://c",
        ),
    ];
    for (missing, verdict, why) in cases {
        let row = row(&Observations { agreement: Some(sights(missing)), ..three() }, Check::Agreement);
        assert_eq!(row.verdict, *verdict, "{row:?}");
        assert!(row.why.contains(why), "{row:?}");
    }
    let mut forgetful = sights(&[(0, 1), (2, 1)]);
    forgetful.published.insert(1, Fate::Dropped);
    let row = row(&Observations { agreement: Some(forgetful), ..three() }, Check::Agreement);
    assert_eq!(row.why, "mqtt://b: acknowledged, and not kept (waited for 10 s)");
}

#[test]
fn two_that_know_nothing_of_each_other_are_both_named() {
    let agreement = Agreement {
        within: 500,
        published: [(0, Fate::Kept), (1, Fate::Kept)].into(),
        seen: [((0, 1), None), ((1, 0), None)].into(),
    };
    let addresses = ["a", "b"].map(address).into();
    let row = row(&Observations { addresses, agreement: Some(agreement), ..fine() }, Check::Agreement);
    let both = "mqtt://a does not show what is published at mqtt://b; mqtt://b does not show what is published at mqtt://a";
    assert_eq!((row.verdict, row.why), (Verdict::No, format!("{both} (waited for 500 ms)")));
}

#[test]
fn an_address_that_lets_nobody_in_is_named_and_the_others_may_agree() {
    let mut agreement = sights(&[]);
    agreement.published.remove(&1);
    agreement.seen.retain(|(at, of), _| *at != 1 && *of != 1);
    let addresses = vec![address("a"), shut("b"), address("c")];
    let seen = Observations { addresses, agreement: Some(agreement), ..fine() };
    let reach = row(&seen, Check::Reach);
    assert_eq!((reach.verdict, &*reach.why), (Verdict::No, "mqtt://b: no answer for 5 s"));
    let agreed = row(&seen, Check::Agreement);
    assert_eq!(
        (agreed.verdict, &*agreed.why),
        (Verdict::Weak, "the 2 that can be reached agree, after 9 ms at most")
    );
    assert_eq!(expect_fit("mqtt://a", &judge(&seen, None)).unwrap_err().failed, ["reach"]);
}

#[test]
fn an_engine_is_known_by_what_it_says_or_does() {
    type Case = (fn(&mut Observations), Option<(Engine, Option<&'static str>)>);
    let cases: &[Case] = &[
        (|_| {}, None),
        (
            |seen| says(seen, "$SYS/broker/version", "mosquitto version 2.0.11"),
            Some((Engine::Mosquitto, Some("2.0.11"))),
        ),
        (
            |seen| says(seen, "$SYS/broker/version", "mpypi-broker version 0.1.0"),
            Some((Engine::Mpypi, Some("0.1.0"))),
        ),
        (|seen| says(seen, "$SYS/broker/version", "another 1"), None),
        (
            |seen| says(seen, "$SYS/brokers/emqx@127.0.0.1/version", "5.8.0"),
            Some((Engine::Emqx, Some("5.8.0"))),
        ),
        (
            |seen| greets(seen).user_properties.push(("mpypi-serves".into(), "mpy-blox".into())),
            Some((Engine::Mpypi, None)),
        ),
        (|seen| greets(seen).assigned_client_id = Some("hmq_x1_2_3".into()), Some((Engine::Hivemq, None))),
        (|seen| greets(seen).assigned_client_id = Some("$GEN/1234".into()), Some((Engine::Aws, None))),
        (|seen| greets(seen).assigned_client_id = Some("auto-1234".into()), Some((Engine::Mosquitto, None))),
        (
            |seen| seen.addresses[0].url = "mqtts://x-ats.iot.eu-west-1.amazonaws.com".into(),
            Some((Engine::Aws, None)),
        ),
        (|seen| seen.dots = Fate::Renamed { topic: "a/b".into() }, Some((Engine::Rabbitmq, None))),
        (
            |seen| {
                seen.addresses[0].five = Some("no".into());
                seen.greeting = None;
                seen.spaces = closed();
            },
            Some((Engine::Nats, None)),
        ),
        (|seen| seen.spaces = closed(), None),
    ];
    for (change, expected) in cases {
        let mut seen = fine();
        change(&mut seen);
        let found = recognise(&seen).map(|found| (found.engine, found.version));
        assert_eq!(found, expected.map(|(engine, version)| (engine, version.map(str::to_owned))));
    }
}

fn says(seen: &mut Observations, topic: &str, text: &str) {
    seen.sys.insert(topic.to_owned(), text.to_owned());
}

#[test]
fn what_is_known_of_an_engine_is_in_hints_and_advice() {
    let mut seen = fine();
    lose(&mut seen, 100_000, 110_000);
    let hint = |engine| {
        let row = judge(&seen, engine).into_iter().find(|row| row.check == Check::Largest);
        row.and_then(|row| row.hint).unwrap()
    };
    let general = hint(None);
    assert!(general.starts_with("publish with `--max-packet 97K`"), "{general}");
    for (engine, setting) in [
        (Engine::Mosquitto, "`message_size_limit`"),
        (Engine::Nats, "`max_payload`"),
        (Engine::Emqx, "`retainer.max_payload_size`"),
        (Engine::Mpypi, "`packet`"),
        (Engine::Aws, "cannot be raised"),
    ] {
        let hint = hint(Some(engine));
        assert!(hint.contains(setting) && hint.ends_with(&general), "{hint}");
    }
    // Of more than some are told, nobody is told nothing.
    use clap::ValueEnum;
    for engine in Engine::value_variants() {
        assert!(!engine.advice().is_empty(), "{}", engine.name());
    }
    let wildcards = judge(&fine(), Some(Engine::Nats)).into_iter().find(|row| row.check == Check::Wildcard);
    assert_eq!(wildcards.unwrap().verdict, Verdict::Weak, "what comes of few messages is no proof");
}
