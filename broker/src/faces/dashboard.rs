//! The dashboard: a page and what it consists of, as they lie in `broker/ui/`, out of the program itself. It has no secrets; what it
//! shows it asks of the [fleet's API](super::api), in the name of whoever looks at it.

use axum::{
    Router,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::Response,
    routing::get,
};
use bytes::Bytes;
use mpypi_protocol::Digest;

use crate::{
    gateway::{
        Here, Problem, Routes,
        file::{Cache, File},
    },
    message::Payload,
};

/// Nothing from elsewhere, nothing inline, in no other site's frame: whatever a device says of itself, it cannot be run.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// The page.
const PAGE: Part = Part { name: "index.html", kind: HTML, content: include_bytes!("../../ui/index.html") };

/// What it consists of, below `/ui/`.
const PARTS: [Part; 15] = [
    Part { name: "api.js", kind: JS, content: include_bytes!("../../ui/api.js") },
    Part { name: "channels.js", kind: JS, content: include_bytes!("../../ui/channels.js") },
    Part { name: "chart.js", kind: JS, content: include_bytes!("../../ui/chart.js") },
    Part { name: "dom.js", kind: JS, content: include_bytes!("../../ui/dom.js") },
    Part { name: "fleet.js", kind: JS, content: include_bytes!("../../ui/fleet.js") },
    Part { name: "icon.svg", kind: SVG, content: include_bytes!("../../ui/icon.svg") },
    Part { name: "main.js", kind: JS, content: include_bytes!("../../ui/main.js") },
    Part { name: "node.js", kind: JS, content: include_bytes!("../../ui/node.js") },
    Part { name: "nodes.js", kind: JS, content: include_bytes!("../../ui/nodes.js") },
    Part { name: "overview.js", kind: JS, content: include_bytes!("../../ui/overview.js") },
    Part { name: "packages.js", kind: JS, content: include_bytes!("../../ui/packages.js") },
    Part { name: "parts.js", kind: JS, content: include_bytes!("../../ui/parts.js") },
    Part { name: "rollouts.js", kind: JS, content: include_bytes!("../../ui/rollouts.js") },
    Part { name: "style.css", kind: CSS, content: include_bytes!("../../ui/style.css") },
    Part { name: "theme.js", kind: JS, content: include_bytes!("../../ui/theme.js") },
];

struct Part {
    name: &'static str,
    kind: &'static str,
    content: &'static [u8],
}

/// The routes of this face.
pub fn routes() -> Routes {
    Router::new().route("/", get(page)).route("/ui/{part}", get(part))
}

async fn page(gateway: Here, asked: HeaderMap) -> Result<Response, Problem> {
    PAGE.answer(gateway, &asked)
}

async fn part(gateway: Here, Path(name): Path<String>, asked: HeaderMap) -> Result<Response, Problem> {
    let part = PARTS.iter().find(|part| part.name == name);
    part.ok_or_else(|| Problem::not_found("the page has no such part"))?.answer(gateway, &asked)
}

impl Part {
    fn answer(&self, State(gateway): Here, asked: &HeaderMap) -> Result<Response, Problem> {
        let file = File::new(
            Payload::Inline(Bytes::from_static(self.content)),
            Digest::of(self.content),
            Cache::Asking,
        );
        let headers = [
            (header::CONTENT_TYPE, self.kind),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        ];
        let with = |file: File, (name, value)| file.header(name, HeaderValue::from_static(value));
        headers.into_iter().fold(file, with).answer(&gateway, asked)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn every_part_of_the_page_is_served_and_nothing_of_it_comes_from_elsewhere() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("ui");
        let mut files: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|item| item.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != PAGE.name)
            .collect();
        files.sort();
        assert_eq!(PARTS.map(|part| part.name.to_owned()).to_vec(), files);
        for part in PARTS.iter().chain([&PAGE]) {
            let text = std::str::from_utf8(part.content).unwrap();
            let text = text.replace("http://www.w3.org/", ""); // names of SVG, which nobody fetches
            for foreign in
                ["http://", "https://", "innerHTML", "insertAdjacentHTML", "document.write", "eval("]
            {
                assert!(!text.contains(foreign), "`{}` has `{foreign}`", part.name);
            }
        }
    }
}
