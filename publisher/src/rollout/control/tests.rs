use mpypi_protocol::{Digest, Entry, query::Facts, rollout::RolloutId};
use proptest::prelude::*;

use super::{super::Policy, *};

const START: i64 = 1_800_000_000;

fn percent(text: &str) -> Percent {
    text.parse().unwrap()
}

fn record() -> Record {
    Record {
        id: RolloutId::from_bits(0xfeed),
        channel: ChannelName::new("dev").unwrap(),
        version: "2.0".to_owned(),
        policy: Policy {
            steps: ["1", "10", "50", "100"].map(percent).to_vec(),
            wait: 600,
            patience: 1800,
            max_failures: percent("2"),
            min_success: percent("95"),
            on_failure: OnFailure::Pause,
            only: None,
            not_before: None,
            window: None,
            jitter: 0,
            optional: false,
        },
        status: Status::Running,
        step: 0,
        first: 2,
        base: Some(1),
        excused: 0,
        reason: None,
    }
}

/// A channel, its nodes, and a rollout that is steered.
struct World {
    record: Record,
    list: UpdateList,
    nodes: BTreeMap<NodeId, NodeStatus>,
    now: i64,
    /// Nodes on which version 2.0 crashes.
    broken: fn(usize) -> bool,
}

impl World {
    /// `count` nodes that run release 1, and a rollout for nobody yet.
    fn new(count: usize) -> World {
        let record = record();
        let mut nodes = BTreeMap::new();
        for number in 0..count {
            let info = format!(
                r#"{{"uname":{{"sysname":"sim","machine":"x","version":"1"}},"channel":"dev","agent":"sim/1","labels":{{"number":"{number}"}}}}"#
            );
            let status = NodeStatus {
                info: Some(Info::parse(info.as_bytes()).unwrap()),
                state: Some(state(Phase::Idle, 1, "1.0")),
                online: Some(true),
            };
            nodes.insert(NodeId::new(format!("n{number:05}")).unwrap(), status);
        }
        let list = list(
            2,
            "2.0",
            START,
            Some(&record.policy.rollout(record.id.clone(), Percent::NONE, Some(1))),
            &[],
        );
        World { record, list, nodes, now: START, broken: |_| false }
    }

    fn view(&self) -> View<'_> {
        let now = Timestamp::from_second(self.now).unwrap();
        View { record: &self.record, list: &self.list, nodes: &self.nodes, now }
    }

    /// Does what is to be done, as often as there is something.
    fn settle(&mut self) -> Next {
        for _ in 0..20 {
            match self.view().next() {
                next @ (Next::Wait(_) | Next::Over) => return next,
                next => self.carry_out(next),
            }
        }
        panic!("it goes round in circles: {:?}", self.record);
    }

    fn carry_out(&mut self, next: Next) {
        let sequence = self.list.release().unwrap().sequence + 1;
        match next {
            Next::Step(rollout) => self.list = list(sequence, "2.0", self.now, Some(&rollout), &[]),
            Next::PutBack { base, revoked } => {
                assert_eq!(base, 1);
                self.list = list(sequence, "1.0", self.now, None, &revoked);
            }
            Next::Record(record) => self.record = *record,
            Next::Wait(_) | Next::Over => {}
        }
    }

    /// Every node does what the list says.
    fn update(&mut self) {
        let release = self.list.release().unwrap().clone();
        let rollout = Rollout::of(&release).unwrap();
        let bad = revoked(&release);
        for (number, (id, node)) in self.nodes.iter_mut().enumerate() {
            let state = node.state.clone().unwrap();
            let had = state.sequence.unwrap();
            let runs_bad = bad.contains(&had);
            let tried = had >= self.record.first && !runs_bad;
            let facts = Facts::of(id.as_str(), node.info.as_ref().unwrap(), (Some(had), None));
            let is_in = rollout.as_ref().is_none_or(|rollout| rollout.admits(&facts));
            if node.online != Some(true) || !(is_in || runs_bad || tried) {
                continue;
            }
            let breaks = release.version == "2.0" && (self.broken)(number);
            let phase = if breaks { Phase::RolledBack } else { Phase::Idle };
            node.state = Some(super::tests::state(phase, release.sequence, &release.version));
        }
    }

    /// How many nodes run version 2.0, and how many took it back.
    fn harm(&self) -> (usize, usize) {
        let count = |phase| {
            let is = |node: &&NodeStatus| {
                node.state
                    .as_ref()
                    .is_some_and(|state| state.phase == phase && state.version.as_deref() == Some("2.0"))
            };
            self.nodes.values().filter(is).count()
        };
        (count(Phase::Idle), count(Phase::RolledBack))
    }

    fn node(&mut self, number: usize) -> &mut NodeStatus {
        self.nodes.values_mut().nth(number).unwrap()
    }

    fn percent(&self) -> String {
        Rollout::of(self.list.release().unwrap())
            .unwrap()
            .map_or("none".to_owned(), |r| r.percent.to_string())
    }

    /// Goes on until there is nothing left to do; which percentages there were.
    fn run(&mut self) -> Vec<String> {
        let mut percents = Vec::new();
        for _ in 0..1000 {
            let next = self.settle();
            if percents.last() != Some(&self.percent()) {
                percents.push(self.percent());
            }
            match next {
                Next::Over => return percents,
                Next::Wait(Some(at)) => self.now = self.now.max(at.as_second()),
                _ => panic!("it waits for ever: {:?}", self.view().counts()),
            }
            self.update();
        }
        panic!("it never ends");
    }
}

fn state(phase: Phase, sequence: u64, version: &str) -> State {
    let text = format!(r#"{{"phase":"idle","sequence":{sequence},"version":"{version}"}}"#);
    State { phase, ..State::parse(text.as_bytes()).unwrap() }
}

fn list(sequence: u64, version: &str, made: i64, rollout: Option<&Rollout>, revoked: &[u64]) -> UpdateList {
    let mut extra = serde_json::Map::new();
    extra.extend(rollout.map(|rollout| ("rollout".to_owned(), rollout.to_value())));
    let release = Release {
        channel: ChannelName::new("dev").unwrap(),
        sequence,
        version: version.to_owned(),
        created: Some(Timestamp::from_second(made).unwrap()),
        expires: None,
        epoch: 0,
        previous: None,
        revoked: revoked.to_vec(),
        extra,
    };
    let text =
        format!(r#"[{{"type":"src","path":"main.py","pkg_sha256":"{}"}}]"#, Digest::of(version.as_bytes()));
    let packages = UpdateList::parse(text.as_bytes()).unwrap();
    let entries = [Entry::Release(release)].into_iter().chain(packages.entries().iter().cloned());
    UpdateList::new(entries.collect()).unwrap()
}

#[test]
fn a_release_that_works_reaches_everybody_step_by_step() {
    let mut world = World::new(200);
    assert_eq!(world.run(), ["1", "10", "50", "100"]);
    assert_eq!((world.record.status, world.harm()), (Status::Done, (200, 0)));
    assert!(world.now >= START + 4 * 600, "each step takes its time");
}

#[test]
fn nothing_is_published_before_the_step_took_its_time() {
    let mut world = World::new(200);
    world.settle();
    world.update();
    let first = world.list.clone();
    world.now += 599;
    assert!(matches!(world.settle(), Next::Wait(Some(at)) if at.as_second() == START + 600));
    assert_eq!((&world.list, world.record.step), (&first, 0));
    world.now += 1;
    world.settle();
    assert_eq!((world.percent().as_str(), world.record.step), ("10", 1));
}

#[test]
fn a_release_that_crashes_on_one_node_in_twenty_stops_within_two_steps_of_2000_nodes() {
    for seed in 1..=5 {
        let mut world = World::new(2000);
        world.record.id = RolloutId::from_bits(seed);
        let rollout = world.record.policy.rollout(world.record.id.clone(), Percent::NONE, Some(1));
        world.list = list(2, "2.0", START, Some(&rollout), &[]);
        world.broken = |number| number.is_multiple_of(20);
        let percents = world.run();
        assert!(percents == ["1", "0"] || percents == ["1", "10", "0"], "seed {seed}: {percents:?}");
        let (runs, back) = world.harm();
        assert!(back >= 1 && runs + back <= 300, "seed {seed}: {runs} run it, {back} took it back");
        assert_eq!(world.record.status, Status::Paused);
    }
}

#[test]
fn the_release_before_is_put_back_where_that_is_wanted_and_nobody_keeps_the_bad_one() {
    let mut world = World::new(500);
    world.record.policy.on_failure = OnFailure::RollBack;
    world.broken = |number| number.is_multiple_of(10);
    let percents = world.run();
    assert_eq!(percents.last().map(String::as_str), Some("none"));
    assert_eq!((world.record.status, world.harm()), (Status::RolledBack, (0, 0)));
    let release = world.list.release().unwrap();
    assert_eq!(release.version, "1.0");
    assert_eq!(revoked(release), (2..release.sequence).collect::<Vec<_>>());
}

#[test]
fn without_a_release_before_it_pauses_instead() {
    let mut world = World::new(500);
    world.record.policy.on_failure = OnFailure::RollBack;
    world.record.base = None;
    world.broken = |number| number.is_multiple_of(10);
    world.run();
    assert_eq!((world.record.status, world.percent().as_str()), (Status::Paused, "0"));
    world.record = world.view().ordered(Order::Abort).unwrap();
    world.settle();
    assert_eq!(world.record.status, Status::Paused);
    assert!(world.record.reason.as_ref().unwrap().contains("no release before"), "{:?}", world.record.reason);
}

#[test]
fn a_failure_stops_it_at_once_and_not_at_the_end_of_the_step() {
    let mut world = World::new(2000);
    world.settle();
    let rollout = Rollout::of(world.list.release().unwrap()).unwrap().unwrap();
    let is_in = |id: &NodeId| rollout.percent.admits(rollout.id.position(id.as_str()));
    let first = world.nodes.iter_mut().find(|(id, _)| is_in(id)).unwrap();
    first.1.state = Some(state(Phase::Failed, 3, "2.0"));
    world.now += 5;
    assert_eq!(world.settle(), Next::Over);
    let reason = world.record.reason.clone().unwrap();
    assert!(reason.starts_with("1 failed: more than 2% of "), "{reason}");
    assert_eq!((world.record.status, world.percent().as_str()), (Status::Paused, "0"));
}

#[test]
fn as_many_failures_as_are_allowed_stop_nothing() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.settle();
    world.update();
    for (number, phase) in [(0, Phase::Failed), (1, Phase::RolledBack)] {
        world.node(number).state = Some(state(phase, 3, "2.0"));
    }
    world.now += 600;
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Done));
}

#[test]
fn who_began_and_is_not_heard_of_any_more_is_silent_and_stops_it_when_the_time_is_over() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.settle();
    world.update();
    for number in 0..3 {
        *world.node(number) = NodeStatus {
            state: Some(state(Phase::Restarting, 3, "2.0")),
            online: Some(false),
            info: world.node(number).info.clone(),
        };
    }
    assert_eq!(world.view().counts().silent, 3);
    assert!(matches!(world.settle(), Next::Wait(_)), "it may be restarting");
    world.now += 600;
    assert_eq!(world.settle(), Next::Over);
    assert_eq!(world.record.status, Status::Paused);
    assert!(world.record.reason.as_ref().unwrap().contains("3 silent"), "{:?}", world.record.reason);
}

#[test]
fn who_was_not_there_does_not_count() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    for number in 0..40 {
        world.node(number).online = Some(false);
    }
    world.run();
    assert_eq!((world.record.status, world.harm().0), (Status::Done, 60));
    let counts = world.view().counts();
    assert_eq!((counts.nodes, counts.succeeded, counts.absent), (60, 60, 40));
}

#[test]
fn a_step_that_does_not_get_there_in_time_is_given_up() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.settle();
    world.update();
    for number in 0..6 {
        world.node(number).state = Some(state(Phase::Idle, 1, "1.0"));
    }
    world.now += 600;
    assert!(matches!(world.settle(), Next::Wait(Some(at)) if at.as_second() == START + 1800));
    world.now += 1200;
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Paused));
    let reason = world.record.reason.clone().unwrap();
    assert_eq!(reason, "only 94 of 100 have it in time, less than 95%");
}

#[test]
fn nodes_that_wait_for_the_night_are_waited_for() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.record.policy.window = Some("22:00-04:00".parse().unwrap());
    world.settle();
    let sequence = world.list.release().unwrap().sequence;
    for number in 0..100 {
        let waits = State { held: Some(sequence), ..state(Phase::Idle, 1, "1.0") };
        world.node(number).state = Some(waits);
    }
    world.now += 100_000;
    assert_eq!(world.view().counts().waiting, 100);
    assert_eq!(world.settle(), Next::Wait(None));
    world.update();
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Done));
}

#[test]
fn nodes_that_wait_for_an_order_hold_nothing_up() {
    let mut world = World::new(10);
    world.record.policy.steps = vec![Percent::ALL];
    world.record.policy.optional = true;
    world.settle();
    let sequence = world.list.release().unwrap().sequence;
    for number in 0..9 {
        world.node(number).state = Some(State { held: Some(sequence), ..state(Phase::Idle, 1, "1.0") });
    }
    world.node(9).state = Some(state(Phase::Idle, sequence, "2.0"));
    world.now += 600;
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Done));
}

#[test]
fn a_node_that_cannot_read_the_list_has_failed() {
    let mut world = World::new(10);
    world.record.policy.steps = vec![Percent::ALL];
    world.settle();
    let sequence = world.list.release().unwrap().sequence;
    let error = Some("bad-rollout: no".to_owned());
    world.node(0).state = Some(State { held: Some(sequence), error, ..state(Phase::Idle, 1, "1.0") });
    assert_eq!(world.view().counts().failed, 1);
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Paused));
}

#[test]
fn nodes_of_other_channels_and_those_it_is_not_for_do_not_count() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.record.policy.only = Some("label.number < 30".parse().unwrap());
    let other = ChannelName::new("stable").unwrap();
    world.node(0).info.as_mut().unwrap().channel = Some(other);
    world.node(0).state = Some(state(Phase::Failed, 3, "2.0"));
    world.settle();
    assert_eq!(world.view().counts().nodes, 29);
    let rest: Vec<_> = world.view().standings().map(|(id, _)| id.to_string()).collect();
    assert!(rest.iter().all(|id| id.as_str() < "n00030"), "{rest:?}");
}

#[test]
fn a_pause_stops_it_and_resuming_goes_on_from_the_same_step_whatever_failed() {
    let mut world = World::new(1000);
    world.broken = |number| number.is_multiple_of(10);
    assert_eq!(world.run().last().map(String::as_str), Some("0"));
    let (step, percent) = (world.record.step, world.record.percent().to_string());
    assert_eq!(world.view().ordered(Order::Pause), None);
    world.record = world.view().ordered(Order::Resume).unwrap();
    assert!(world.record.excused > 0);
    world.settle();
    assert_eq!((world.record.step, world.percent()), (step, percent));
    assert_eq!(world.view().ordered(Order::Resume), None, "it runs");
    world.record = world.view().ordered(Order::Pause).unwrap();
    world.settle();
    assert_eq!((world.record.status, world.percent().as_str()), (Status::Paused, "0"));
}

#[test]
fn a_release_that_somebody_else_publishes_ends_it() {
    for status in [Status::Running, Status::Paused, Status::RollingBack] {
        let mut world = World::new(10);
        world.settle();
        world.list = list(9, "3.0", START, None, &[]);
        world.record.status = status;
        assert_eq!((world.settle(), world.record.status), (Next::Over, Status::Superseded));
        assert_eq!(world.record.reason.as_deref(), Some("release 9 was published meanwhile"));
    }
}

#[test]
fn an_abort_puts_the_release_before_back_from_any_step() {
    for steps in 0..3 {
        let mut world = World::new(200);
        for _ in 0..steps {
            world.settle();
            world.update();
            world.now += 600;
        }
        world.record = world.view().ordered(Order::Abort).unwrap();
        world.run();
        assert_eq!((world.record.status, world.harm().0), (Status::RolledBack, 0), "after {steps} steps");
        assert_eq!(world.view().ordered(Order::Abort), None);
    }
}

#[test]
fn putting_back_waits_for_those_who_are_there_and_says_who_did_not_come_back() {
    let mut world = World::new(100);
    world.record.policy.steps = vec![Percent::ALL];
    world.settle();
    world.update();
    world.record = world.view().ordered(Order::Abort).unwrap();
    assert!(matches!(world.settle(), Next::Wait(Some(_))));
    let stuck = world.node(0).state.clone();
    world.node(1).online = Some(false);
    world.update();
    world.node(0).state = stuck;
    assert!(matches!(world.settle(), Next::Wait(Some(_))), "one that is there still runs it");
    world.now += 1800;
    assert_eq!((world.settle(), world.record.status), (Next::Over, Status::RolledBack));
    assert!(world.record.reason.as_ref().unwrap().ends_with("1 did not come back in time"));
}

#[test]
fn a_mpyblox_node_counts_by_what_its_broker_says_and_by_its_versions() {
    let mut world = World::new(1);
    world.record.policy.steps = vec![Percent::ALL];
    let text = r#"[{"type":"release","channel":"dev","sequence":3,"version":"2.0","rollout":{"id":"000000000000feed","percent":"100"}},
        {"type":"wheel","name":"blink","version":"2.0","pkg_sha256":"080a9ed428559ef602668b4c00f114f1a11c3f6b02a435f0bdc154578e4d7f22"}]"#;
    world.list = UpdateList::parse(text.as_bytes()).unwrap();
    let mut standing = |version: &str, state: Option<&str>| {
        let info = format!(
            r#"{{"uname":{{"sysname":"esp32","machine":"x","version":"1"}},"versions":{{"blink":"{version}","other":"7"}}}}"#
        );
        let state = state.map(|state| {
            State::parse(format!(r#"{{{state},"by":"broker","channel":"dev"}}"#).as_bytes()).unwrap()
        });
        let channel = state.is_none().then(|| ChannelName::new("dev").unwrap());
        let info = Info { channel, ..Info::parse(info.as_bytes()).unwrap() };
        *world.node(0) = NodeStatus { info: Some(info), state, online: None };
        world.view().standings().next().map(|(_, standing)| standing)
    };
    let idle = Some(r#""phase":"idle""#);
    assert_eq!(standing("2.0", idle), Some(Standing::Succeeded));
    assert_eq!(standing("1.0", idle), Some(Standing::Pending));
    assert_eq!(standing("1.0", Some(r#""phase":"idle","held":3"#)), Some(Standing::Pending));
    assert_eq!(standing("1.0", Some(r#""phase":"failed","sequence":3"#)), Some(Standing::Failed));
    assert_eq!(standing("1.0", None), Some(Standing::Absent), "another's broker says nothing");
}

/// Whoever steers may be killed before and after everything that it does; the next one starts from what is retained.
#[test]
fn killed_after_every_single_thing_it_does_it_ends_the_same() {
    let ends = |kill_at: usize| {
        let mut world = World::new(300);
        world.record.policy.on_failure = OnFailure::RollBack;
        world.broken = |number| number.is_multiple_of(15);
        let mut done = 0;
        for _ in 0..1000 {
            let next = world.view().next();
            match &next {
                Next::Over => return (world.record.status, world.harm(), world.percent(), done),
                Next::Wait(at) => {
                    world.now = at.map_or(world.now + 60, |at| world.now.max(at.as_second()));
                    world.update();
                }
                _ => {
                    done += 1;
                    if done == kill_at {
                        // It was decided and not done: an hour later somebody else looks.
                        world.now += 3600;
                        continue;
                    }
                    world.carry_out(next);
                }
            }
        }
        panic!("killed at {kill_at}, it never ends: {:?}", world.record);
    };
    let (status, harm, percent, done) = ends(usize::MAX);
    assert_eq!((status, harm, percent.as_str()), (Status::RolledBack, (0, 0), "none"));
    assert!(done >= 4, "{done}");
    for kill_at in 1..=done {
        let (status, harm, percent, _) = ends(kill_at);
        assert_eq!(
            (status, harm, percent.as_str()),
            (Status::RolledBack, (0, 0), "none"),
            "killed at {kill_at}"
        );
    }
}

#[test]
fn a_record_is_read_as_it_is_written_and_one_that_makes_no_sense_is_none() {
    let mut record = record();
    assert_eq!(Record::parse(&record.to_bytes()).unwrap(), record);
    record.policy.only = Some("node = a".parse().unwrap());
    record.policy.window = Some("22:00-04:00".parse().unwrap());
    record.reason = Some("why".to_owned());
    assert_eq!(Record::parse(&record.to_bytes()).unwrap(), record);
    record.step = 4;
    assert!(Record::parse(&record.to_bytes()).unwrap_err().to_string().contains("no such step"));
    record.step = 0;
    record.policy.steps.reverse();
    assert!(Record::parse(&record.to_bytes()).is_err());
    assert!(Record::parse(b"{}").is_err() && Record::parse(b"").is_err());
}

proptest! {
    #[test]
    fn a_step_never_goes_back_and_nothing_is_published_twice_for_the_same(
        broken in 0..30_usize, absent in 0..50_usize, steps in 1..5_usize, hours in 0..3_i64,
    ) {
        let mut world = World::new(120);
        world.record.policy.steps = ["2", "20", "60", "100"].map(percent)[4 - steps.min(4)..].to_vec();
        let mut published = Vec::new();
        for round in 0..200 {
            let step = world.record.step;
            match world.view().next() {
                Next::Over => break,
                Next::Wait(_) => {
                    world.now += 300 + hours * 3600;
                    world.update();
                    for number in 0..absent {
                        world.node(number).online = Some(round % 3 == 0);
                    }
                    for number in 60..60 + broken {
                        if world.node(number).state.as_ref().unwrap().sequence > Some(1) {
                            world.node(number).state.as_mut().unwrap().phase = Phase::RolledBack;
                        }
                    }
                }
                next => {
                    if let Next::Step(rollout) = &next {
                        prop_assert_ne!(published.last(), Some(&rollout.percent));
                        published.push(rollout.percent);
                    }
                    world.carry_out(next);
                }
            }
            prop_assert!(world.record.step >= step);
        }
        prop_assert!(!world.record.status.is_under_way() || world.record.status == Status::Paused
            || absent > 0, "{:?}", world.record);
    }
}

#[test]
fn a_step_is_given_its_time_from_when_nodes_may_begin() {
    let mut world = World::new(100);
    world.record.policy.not_before = Timestamp::from_second(START + 7200).ok();
    let stored = Record::parse(&world.record.to_bytes()).unwrap();
    assert_eq!(stored, world.record, "it is kept as it was");
    world.settle();
    world.now += 7200 + 599;
    assert!(matches!(world.settle(), Next::Wait(Some(at)) if at.as_second() == START + 7200 + 600));
    assert_eq!((world.record.step, world.record.status), (0, Status::Running), "nobody is late");
    world.update();
    world.now += 1;
    world.settle();
    assert_eq!(world.record.step, 1);
}
