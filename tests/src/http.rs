//! A small HTTP client that does what it is told, also what no proper client does.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use crate::PATIENCE;

/// A connection.
#[derive(Debug)]
pub struct Web<S = TcpStream> {
    stream: S,
    come: Vec<u8>,
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub code: u16,
    /// The headers, their names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Web {
    /// Connects.
    #[must_use]
    pub fn open(address: SocketAddr) -> Web {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Web::over(stream)
    }

    /// Asks on a connection of its own.
    #[must_use]
    pub fn get(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
        Web::open(address).ask("GET", path, headers, b"")
    }

    /// The stream itself.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl<S: Read + Write> Web<S> {
    /// HTTP over this stream.
    pub fn over(stream: S) -> Web<S> {
        Web { stream, come: Vec::new() }
    }

    /// Sends a request, and waits for the answer.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Host")) {
            head += "Host: localhost\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        self.send(&[head.as_bytes(), b"\r\n", body].concat());
        self.answer(method).expect("an answer")
    }

    /// Sends bytes as they are; the broker may have closed.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).ok();
    }

    /// The next answer, to a request of this method; `None` if the connection has ended.
    ///
    /// # Panics
    /// The answer has no length, or ends before it.
    pub fn answer(&mut self, method: &str) -> Option<Answer> {
        let end = loop {
            match self.come.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(end) => break end,
                None if self.fill() => {}
                None => return None,
            }
        };
        let head = String::from_utf8(self.come.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let code = lines.next()?.split(' ').nth(1)?.parse().unwrap();
        let headers = lines.map(|line| line.split_once(": ").expect("a colon and a space"));
        let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
        let mut answer = Answer { code, headers, body: Vec::new() };
        assert_eq!(answer.header("transfer-encoding"), None, "old clients understand no chunks: {answer:?}");
        if method != "HEAD" && code != 304 && code >= 200 {
            let length: usize = answer.header("content-length").expect("a length").parse().unwrap();
            while self.come.len() < length {
                assert!(self.fill(), "{} of {length} bytes came", self.come.len());
            }
            let rest = self.come.split_off(length);
            answer.body = std::mem::replace(&mut self.come, rest);
        }
        Some(answer)
    }

    /// Whether the connection ends without a further byte.
    #[must_use]
    pub fn is_closed(&mut self) -> bool {
        self.come.is_empty() && !self.fill()
    }

    fn fill(&mut self) -> bool {
        let mut scratch = [0; 64 * 1024];
        match self.stream.read(&mut scratch) {
            Ok(count) => {
                self.come.extend_from_slice(&scratch[..count]);
                count > 0
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("nothing came for {} s", PATIENCE.as_secs())
            }
            Err(_) => false,
        }
    }
}

/// A stream of server-sent events.
#[derive(Debug)]
pub struct Events {
    lines: std::io::Lines<std::io::BufReader<TcpStream>>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its id, if it has one.
    pub id: Option<String>,
    /// What it is.
    pub name: String,
    /// What it says.
    pub data: serde_json::Value,
}

impl Events {
    /// Listens; fails with the status if it is another one than 200.
    ///
    /// # Errors
    /// The status.
    pub fn open(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Events, u16> {
        use std::io::BufRead;
        let mut web = Web::open(address);
        // To an old client the body goes as it is, until the connection ends.
        let mut head = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n");
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        web.send((head + "\r\n").as_bytes());
        let mut lines = std::io::BufReader::new(web.stream).lines();
        let first = lines.next().unwrap().unwrap();
        let code = first.split(' ').nth(1).unwrap().parse().unwrap();
        while lines.next().is_some_and(|line| !line.unwrap().is_empty()) {}
        if code == 200 { Ok(Events { lines }) } else { Err(code) }
    }

    /// The next event; `None` when the stream has ended.
    pub fn event(&mut self) -> Option<Event> {
        let (mut id, mut name) = (None, String::new());
        loop {
            let line = self.lines.next()?.ok()?;
            match line.split_once(": ") {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("event", value)) => value.clone_into(&mut name),
                Some(("data", data)) => {
                    return Some(Event { id, name, data: serde_json::from_str(data).unwrap() });
                }
                _ => {}
            }
        }
    }

    /// The next event of which `is_it` holds.
    #[track_caller]
    pub fn until(&mut self, is_it: impl Fn(&Event) -> bool) -> Event {
        loop {
            let event = self.event().expect("the stream goes on");
            if is_it(&event) {
                return event;
            }
        }
    }
}

impl Answer {
    /// The value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The answer, if it has this status.
    #[track_caller]
    #[must_use]
    pub fn expect(self, code: u16) -> Answer {
        assert_eq!(self.code, code, "{:?}: {}", self.headers, String::from_utf8_lossy(&self.body));
        self
    }
}
