//! `mpypi-broker check`

use mpypi_broker::{
    Limits,
    access::users::Users,
    control::{Answer, Done, Link, LinkError, Missing, Request},
    edge::Part,
    listen::tls::Tls,
    message::chain,
    metrics,
    settings::{self, Settings},
};
use serde_json::json;

use crate::{
    cli::CheckArgs,
    commands::progress::{count, size},
    log,
};

/// Something looked at: its name, and how it is or what is wrong with it.
type Finding = (&'static str, Result<String, String>);

/// Says whether everything is in order.
pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<bool> {
    log::to_stderr(false, "error")?;
    let (settings, limits) = settings(args);
    let mut findings = vec![settings, users(args), disk(args, &limits)];
    findings.extend(index(args));
    let is_good = findings.iter().all(|(_, finding)| finding.is_ok());
    if args.data.json {
        let all: Vec<_> = findings
            .iter()
            .map(|(name, finding)| {
                let text = finding.as_ref().unwrap_or_else(|problem| problem);
                json!({ "name": name, "ok": finding.is_ok(), "detail": text })
            })
            .collect();
        println!("{}", json!({ "ok": is_good, "checks": all }));
    } else {
        for (name, finding) in &findings {
            match finding {
                Ok(text) => println!("ok     {name}: {text}"),
                Err(problem) => println!("wrong  {name}: {problem}"),
            }
        }
    }
    Ok(is_good)
}

/// The configuration file, the certificates it names, and the limits it sets.
fn settings(args: &CheckArgs) -> (Finding, Limits) {
    let path = args.data.data.join(settings::FILE);
    if !path.exists() {
        return (("settings", Ok("no configuration file: all as usual".to_owned())), Limits::default());
    }
    let read = Settings::load(&path).map_err(|error| chain(&error)).and_then(|settings| {
        settings.limits.check().map_err(|error| chain(&error))?;
        let certificates = match settings.tls.files().map_err(|error| chain(&error))? {
            Some(files) => Tls::load(files).map(|_| ", certificates read").map_err(|error| chain(&error))?,
            None => "",
        };
        let upstream = settings.upstream.upstream(Part::Edge).map_err(|error| chain(&error))?;
        let upstream = upstream.map(|upstream| {
            let urls: Vec<_> = upstream.endpoints.iter().map(|endpoint| endpoint.url().to_string()).collect();
            format!(", upstream {}", urls.join(", "))
        });
        let upstream = upstream.unwrap_or_default();
        Ok((format!("`{}` read{certificates}{upstream}", path.display()), settings.limits))
    });
    match read {
        Ok((text, limits)) => (("settings", Ok(text)), limits),
        Err(problem) => (("settings", Err(problem)), Limits::default()),
    }
}

fn users(args: &CheckArgs) -> Finding {
    let users = Users::load(&args.data.data).map_err(|error| chain(&error));
    ("users", users.map(|users| count(users.iter().count() as u64, "user")))
}

fn disk(args: &CheckArgs, limits: &Limits) -> Finding {
    let reserve = limits.disk_reserve;
    let finding = match metrics::disk(&args.data.data) {
        Some((free, of)) if free < reserve => {
            Err(format!("{} of {} free: messages are refused below {}", size(free), size(of), size(reserve)))
        }
        Some((free, of)) => Ok(format!("{} of {} free", size(free), size(of))),
        None => Err("the system does not tell how much is free".to_owned()),
    };
    ("disk", finding)
}

fn index(args: &CheckArgs) -> Vec<Finding> {
    let mut findings = Vec::new();
    let asked = Link::open(&args.data.data, Missing::Refuse).and_then(|mut link| {
        let done = link.ask(&Request::Check { deep: args.deep }, |answer| {
            if let Answer::Problem(problem) = answer {
                findings.push(("index", Err(format!("`{}`: {}", problem.at, problem.problem))));
            }
            Ok::<(), LinkError>(())
        })?;
        Ok((done, link.is_live()))
    });
    match asked {
        Ok((Done { messages, bytes }, is_live)) => {
            let by = if is_live { "the running broker" } else { "no broker runs" };
            let read = if args.deep { format!(", {} read", size(bytes)) } else { String::new() };
            if findings.is_empty() {
                findings.push(("index", Ok(format!("{}{read} ({by})", count(messages, "message")))));
            }
        }
        Err(error) => findings.push(("index", Err(chain(&error)))),
    }
    findings
}
