//! What a pipeline gets of a fleet: a page, a documented JSON, annotations, and one script that does it all.

use std::{collections::BTreeSet, fs, process::Command};

use mpypi_tests::{Server, World, program, run, run_with};
use serde_json::Value;

fn channel(world: &World) {
    world.write("dev/src/main.py", "print(1)\n");
    world.write("dev/src/data/table.bin", [1, 2, 3, 5].repeat(1000));
}

fn broken(world: &World) -> String {
    let profile = "[application]\nbroken = \"50%\"\n[history]\nused = \"30%\"\nowned = \"30%\"\n\
                   [abi]\n6 = \"50%\"\nnone = \"50%\"\n";
    world.write("broken.toml", profile).to_str().unwrap().to_owned()
}

#[test]
fn a_fleet_leaves_a_page_for_people_a_json_as_its_schema_says_and_annotations() {
    let world = World::new();
    let server = Server::start(&world);
    channel(&world);
    let _ = run("mpypi", &["publish", &world.text("dev"), "--broker", &server.url()]).expect_code(0);
    let (profile, url) = (broken(&world), server.url());
    let [page, json, summary] = ["fleet.html", "fleet.json", "summary.md"].map(|name| world.text(name));
    let arguments = ["fleet", "--broker", &url, "--nodes", "60", "--profile", &profile, "--for", "5s"];
    let more = [
        "--confirm-after",
        "100ms",
        "--expect",
        "applied=100%",
        "--github",
        "--html",
        &page,
        "--report",
        &json,
    ];
    let environment = [("GITHUB_STEP_SUMMARY", summary.as_str())];
    let fleet = run_with("mpypi-agent", &[&arguments[..], &more].concat(), &environment).expect_code(3);

    let error = |line: &&str| line.starts_with("::error title=fleet%3A applied=100%25::found ");
    assert!(fleet.stderr.lines().any(|line| error(&line)), "{}", fleet.stderr);
    let summary = fs::read_to_string(summary).unwrap();
    assert!(
        summary.starts_with("### Not as expected: 60 devices") && summary.contains("**not met**"),
        "{summary}"
    );

    let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let page = fs::read_to_string(page).unwrap();
    for title in
        ["Convergence", "Phases", "Bytes received", "Retries", "Cohorts", "Releases", "Devices in trouble"]
    {
        assert!(page.contains(&format!("<h2>{title}</h2>")), "no {title}");
    }
    let trouble = report["troubled"][0]["number"].as_u64().unwrap();
    assert!(page.contains(&format!("--seed 1 --node {trouble}</code>")), "no way to see it alone");
    // Nothing is fetched, nothing runs.
    for word in ["http", "<script", "@import", "url(", "src="] {
        assert!(!page.contains(word), "the page is not self-contained: {word}");
    }

    let cohorts = report["cohorts"].as_array().unwrap();
    let of = |by: &str| cohorts.iter().filter(|cohort| cohort["by"] == by).collect::<Vec<_>>();
    for (by, names) in [("history", 3), ("abi", 2), ("fault", 2), ("platform", 1)] {
        let nodes: u64 = of(by).iter().map(|cohort| cohort["nodes"].as_u64().unwrap()).sum();
        assert_eq!((of(by).len(), nodes), (names, 60), "{by}: {cohorts:?}");
    }
    let sound = of("fault").into_iter().find(|cohort| cohort["name"] == "none").unwrap();
    assert_eq!(sound["nodes"], sound["applied"], "what breaks some broke others: {sound}");

    let schema = run("mpypi-agent", &["fleet", "--show-schema"]).expect_code(0).json();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(&report), keys(&schema["properties"]));
    for (kind, value) in
        [("Moment", &report["samples"][0]), ("Cohort", &cohorts[0]), ("Row", &report["results"][0])]
    {
        let described = &schema["$defs"][kind]["properties"];
        assert_eq!(keys(value), keys(described), "{kind}");
        assert!(described.as_object().unwrap().values().all(|key| key["description"].is_string()), "{kind}");
    }
}

#[test]
fn one_script_rehearses_a_channel_in_a_pipeline_and_its_exit_code_decides() {
    let world = World::new();
    channel(&world);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/ci/rehearse.sh");
    let programs = program("mpypi").parent().unwrap().to_owned();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let (dev, reports) = (world.text("dev"), world.text("reports"));
    let rehearse = |variables: &[(&str, &str)]| {
        let mut command = Command::new("bash");
        command.arg(script).env("PATH", &path).env("MPYPI_REPORTS", &reports).env_remove("GITHUB_ACTIONS");
        command.envs(variables.iter().copied()).output().unwrap()
    };
    assert_eq!(rehearse(&[]).status.code(), Some(2));
    let usual = [
        ("MPYPI_CHANNEL", dev.as_str()),
        ("MPYPI_NODES", "20"),
        ("MPYPI_PROFILE", "lab"),
        ("MPYPI_TIME", "10s"),
    ];
    let good = rehearse(&usual);
    assert_eq!(good.status.code(), Some(0), "{}", String::from_utf8_lossy(&good.stderr));
    for name in ["fleet.html", "fleet.json", "fleet.xml"] {
        assert!(world.path("reports").join(name).is_file(), "{name}");
    }
    let more = [("MPYPI_EXPECT", "applied=100%\nfailed>=1\n"), ("GITHUB_ACTIONS", "true")];
    let bad = rehearse(&[&usual[..], &more].concat());
    assert_eq!(bad.status.code(), Some(3));
    let said = String::from_utf8_lossy(&bad.stderr);
    assert!(said.contains("::error title=fleet%3A failed>=1::found 0"), "{said}");
}
