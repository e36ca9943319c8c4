//! A real browser, Chromium without a window, driven through `tests/dashboard/driver.mjs`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};

use crate::programs::peer;

/// A browser with one page; ends with its value.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    url: String,
}

impl Browser {
    /// A browser that shows what is at `address`.
    #[must_use]
    pub fn open(address: SocketAddr) -> Browser {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let modules = root.join("../target/peers/dashboard");
        assert!(
            modules.join("node_modules").exists(),
            "the browser's driver is not installed: run `bash tests/peers.sh` first"
        );
        let screenshots = Browser::screenshots();
        fs::create_dir_all(&screenshots).unwrap();
        let mut child = Command::new(peer("node"))
            .arg(root.join("dashboard/driver.mjs"))
            .args([modules, peer("chromium"), screenshots])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let url = format!("http://{address}/");
        let mut browser = Browser { child, orders, answers, url };
        browser.visit("light", (1280, 860));
        browser
    }

    /// Where screenshots are kept.
    #[must_use]
    pub fn screenshots() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dashboard")
    }

    /// Comes anew, as somebody who never was here, with this colour scheme and size of the window.
    pub fn visit(&mut self, scheme: &str, (width, height): (u32, u32)) {
        let url = self.url.clone();
        self.order(json!({"do": "open", "url": url, "scheme": scheme, "width": width, "height": height}));
    }

    /// Goes to another view.
    pub fn go(&mut self, hash: &str) {
        self.order(json!({"do": "go", "hash": hash}));
    }

    /// Waits until something that matches `selector` shows `text`.
    #[track_caller]
    pub fn see(&mut self, selector: &str, text: &str) {
        self.order(json!({"do": "see", "selector": selector, "text": text}));
    }

    /// Waits until nothing that matches `selector` shows `text`.
    #[track_caller]
    pub fn miss(&mut self, selector: &str, text: &str) {
        self.order(json!({"do": "miss", "selector": selector, "text": text}));
    }

    /// What the first element that matches shows.
    #[track_caller]
    pub fn text(&mut self, selector: &str) -> String {
        self.order(json!({"do": "text", "selector": selector})).as_str().unwrap().to_owned()
    }

    /// How many elements match.
    #[track_caller]
    pub fn count(&mut self, selector: &str) -> u64 {
        self.order(json!({"do": "count", "selector": selector})).as_u64().unwrap()
    }

    /// Clicks on what matches `selector` and shows `text`.
    #[track_caller]
    pub fn click(&mut self, selector: &str, text: &str) {
        self.order(json!({"do": "click", "selector": selector, "text": text}));
    }

    /// Types into a field, in place of what it has.
    #[track_caller]
    pub fn fill(&mut self, selector: &str, text: &str) {
        self.order(json!({"do": "type", "selector": selector, "text": text}));
    }

    /// Chooses an option.
    #[track_caller]
    pub fn choose(&mut self, selector: &str, value: &str) {
        self.order(json!({"do": "choose", "selector": selector, "value": value}));
    }

    /// Presses a key.
    #[track_caller]
    pub fn press(&mut self, key: &str) {
        self.order(json!({"do": "press", "key": key}));
    }

    /// Runs the body of an asynchronous function in the page.
    #[track_caller]
    pub fn run(&mut self, code: &str) -> Value {
        self.order(json!({"do": "run", "code": code}))
    }

    /// Changes the window's size.
    pub fn resize(&mut self, (width, height): (u32, u32)) {
        self.order(json!({"do": "size", "width": width, "height": height}));
    }

    /// Changes what colours the system asks for.
    pub fn scheme(&mut self, scheme: &str) {
        self.order(json!({"do": "scheme", "scheme": scheme}));
    }

    /// Keeps a picture of what is seen.
    pub fn screenshot(&mut self, name: &str) {
        self.order(json!({"do": "screenshot", "name": name}));
    }

    /// What axe finds wrong for those who see, hear or move otherwise, and what does not fit into the window.
    #[track_caller]
    pub fn judge(&mut self) -> Vec<String> {
        texts(&self.order(json!({"do": "judge"})))
    }

    /// Errors, dialogs, and requests to elsewhere since the page was opened.
    #[track_caller]
    pub fn complaints(&mut self) -> Vec<String> {
        texts(&self.order(json!({"do": "complaints"})))
    }

    #[track_caller]
    fn order(&mut self, order: Value) -> Value {
        let orders = self.orders.as_mut().unwrap();
        writeln!(orders, "{order}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let answer: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("the browser's driver has ended"));
        match answer.get("error") {
            None => answer["ok"].clone(),
            Some(error) => {
                let seen = self.seen();
                panic!("{order}: {}\n--- the page\n{seen}", error.as_str().unwrap_or_default());
            }
        }
    }

    /// What the page shows, for whoever wonders why not something else; a picture is kept, too.
    fn seen(&mut self) -> String {
        let mut ask = |order: Value| -> Option<Value> {
            writeln!(self.orders.as_mut()?, "{order}").ok()?;
            let mut line = String::new();
            self.answers.read_line(&mut line).ok()?;
            serde_json::from_str(&line).ok()
        };
        ask(json!({"do": "screenshot", "name": "failed"}));
        let text = ask(json!({"do": "text", "selector": "body"})).unwrap_or_default();
        text["ok"].as_str().unwrap_or_default().to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // At the end of its orders it closes the browser.
        drop(self.orders.take());
        self.child.wait().ok();
    }
}

fn texts(value: &Value) -> Vec<String> {
    let all = value.as_array().unwrap().iter();
    all.map(|text| text.as_str().unwrap().to_owned()).collect()
}
