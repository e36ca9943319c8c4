//! git's smart HTTP over the client that everything here uses: the same TLS, trust and limits. A request goes out when its
//! answer is read; nothing needs a thread.

use std::{
    any::Any,
    cell::RefCell,
    io::{self, BufRead, BufReader, Cursor, Read, Write},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use gix_transport::client::{
    AuthenticationRequired,
    blocking_io::http::{GetResponse, Http, PostBodyDataKind, PostResponse},
};
use tokio::sync::mpsc;
use ureq::{Agent, ResponseExt};

use crate::limits;

/// Counts what comes, and says when to stop.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    come: Arc<AtomicU64>,
    say: mpsc::UnboundedSender<u64>,
    stop: Arc<AtomicBool>,
}

impl Meter {
    pub(super) fn new(say: mpsc::UnboundedSender<u64>, stop: Arc<AtomicBool>) -> Meter {
        Meter { come: Arc::default(), say, stop }
    }

    /// Whether somebody stopped it.
    pub(super) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    fn count(&self, bytes: usize) -> io::Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other(Trouble::Stopped));
        }
        let before = self.come.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = before + bytes as u64;
        if now > limits::GIT_DOWNLOAD {
            return Err(io::Error::other(Trouble::TooLarge));
        }
        if now / limits::GIT_TOLD != before / limits::GIT_TOLD {
            // Nobody listens any more if all of it is given up.
            let _ = self.say.send(now);
        }
        Ok(())
    }
}

/// What is wrong, in a way that is found again below gix's errors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    /// A status that is no success.
    #[error("the server answers {0}")]
    Answer(u16),
    /// More than [`limits::GIT_DOWNLOAD`].
    #[error("it sends too much")]
    TooLarge,
    /// Somebody stopped it.
    #[error("stopped")]
    Stopped,
    /// A redirect that leads out of TLS.
    #[error("it leads to `{0}`, where nobody vouches for what comes")]
    Unsafe(String),
}

/// The client.
pub(super) struct Wire {
    agent: Agent,
    meter: Meter,
    /// Where a redirect led to.
    moved: Rc<RefCell<Option<String>>>,
}

impl Wire {
    pub(super) fn new(agent: &Agent, meter: &Meter) -> Wire {
        Wire { agent: agent.clone(), meter: meter.clone(), moved: Rc::default() }
    }

    fn exchange(
        &self,
        url: &str,
        base: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
        is_post: bool,
    ) -> Shared {
        let headers = headers.into_iter().filter_map(|line| {
            let (name, value) = line.as_ref().split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        });
        let url = match &*self.moved.borrow() {
            Some(moved) => url.strip_prefix(base).map(|tail| format!("{moved}{tail}")),
            None => None,
        }
        .unwrap_or_else(|| url.to_owned());
        let tail = url.strip_prefix(self.moved.borrow().as_deref().unwrap_or(base)).unwrap_or_default();
        Shared(Rc::new(RefCell::new(Exchange {
            agent: self.agent.clone(),
            meter: self.meter.clone(),
            moved: self.moved.clone(),
            tail: tail.to_owned(),
            url,
            headers: headers.collect(),
            post: is_post.then(Vec::new),
            is_done: false,
            body: None,
        })))
    }
}

impl Http for Wire {
    type Headers = Heads;
    type ResponseBody = Reply;
    type PostBody = Post;

    fn get(
        &mut self,
        url: &str,
        base_url: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> gix::Result<GetResponse<Heads, Reply>> {
        let exchange = self.exchange(url, base_url, headers, false);
        Ok(GetResponse { headers: Heads::of(&exchange), body: Reply::of(&exchange) })
    }

    fn post(
        &mut self,
        url: &str,
        base_url: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
        _body: PostBodyDataKind,
    ) -> gix::Result<PostResponse<Heads, Reply, Post>> {
        let exchange = self.exchange(url, base_url, headers, true);
        let post_body = Post(Shared(exchange.0.clone()));
        Ok(PostResponse { post_body, headers: Heads::of(&exchange), body: Reply::of(&exchange) })
    }

    fn configure(&mut self, _config: &dyn Any) -> gix::Result {
        // git's own settings about HTTP have no say: see `Wire::new`.
        Ok(())
    }

    fn redirected_base_url(&self) -> Option<String> {
        self.moved.borrow().clone()
    }
}

/// One request and its answer.
struct Exchange {
    agent: Agent,
    meter: Meter,
    moved: Rc<RefCell<Option<String>>>,
    url: String,
    /// What of the URL follows the repository's.
    tail: String,
    headers: Vec<(String, String)>,
    /// What is sent, if anything is.
    post: Option<Vec<u8>>,
    is_done: bool,
    body: Option<BufReader<Counted>>,
}

struct Shared(Rc<RefCell<Exchange>>);

impl Exchange {
    /// Sends the request; the answer's headers, a line each.
    fn perform(&mut self) -> io::Result<Vec<u8>> {
        self.is_done = true;
        self.meter.count(0)?;
        let answer = match self.post.take() {
            None => {
                let headers = self.headers.iter();
                headers.fold(self.agent.get(&self.url), |to, (name, value)| to.header(name, value)).call()
            }
            Some(bytes) => {
                let headers = self.headers.iter();
                let request = self.agent.post(&self.url);
                headers.fold(request, |to, (name, value)| to.header(name, value)).send(&bytes[..])
            }
        };
        let answer = answer.map_err(io::Error::other)?;
        let came_from = answer.get_uri().to_string();
        if self.url.starts_with("https:") && !came_from.starts_with("https:") {
            return Err(io::Error::other(Trouble::Unsafe(came_from)));
        }
        // gix takes its credentials back where another host is meant.
        if came_from != self.url
            && let Some(base) = came_from.strip_suffix(&self.tail)
        {
            *self.moved.borrow_mut() = Some(base.to_owned());
        }
        match answer.status().as_u16() {
            200 => {}
            401 => {
                let asked = answer.headers().get_all("www-authenticate").iter();
                let www_authenticate = asked.map(|value| value.as_bytes().into()).collect();
                let required = AuthenticationRequired { www_authenticate };
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, required));
            }
            code => return Err(io::Error::other(Trouble::Answer(code))),
        }
        let mut lines = Vec::new();
        for (name, value) in answer.headers() {
            lines.extend_from_slice(name.as_str().as_bytes());
            lines.push(b':');
            lines.extend_from_slice(value.as_bytes());
            lines.push(b'\n');
        }
        let body = answer.into_body().into_reader();
        let counted = Counted { body: Box::new(body), meter: self.meter.clone() };
        self.body = Some(BufReader::with_capacity(limits::GIT_PIECE, counted));
        Ok(lines)
    }
}

/// A body whose bytes are counted.
struct Counted {
    body: Box<dyn Read>,
    meter: Meter,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        self.meter.count(read)?;
        Ok(read)
    }
}

/// What is sent.
pub(super) struct Post(Shared);

impl Write for Post {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut exchange = self.0.0.borrow_mut();
        let post = exchange.post.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        if post.len() + bytes.len() > limits::GIT_REQUEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        post.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The headers of an answer.
pub(super) struct Heads {
    exchange: Shared,
    lines: Option<Cursor<Vec<u8>>>,
}

impl Heads {
    fn of(exchange: &Shared) -> Heads {
        Heads { exchange: Shared(exchange.0.clone()), lines: None }
    }
}

impl BufRead for Heads {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.lines.is_none() {
            let lines = self.exchange.0.borrow_mut().perform()?;
            self.lines = Some(Cursor::new(lines));
        }
        match &mut self.lines {
            Some(lines) => lines.fill_buf(),
            None => Ok(&[]),
        }
    }

    fn consume(&mut self, bytes: usize) {
        if let Some(lines) = &mut self.lines {
            lines.consume(bytes);
        }
    }
}

impl Read for Heads {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

/// The body of an answer.
pub(super) struct Reply {
    exchange: Shared,
    body: Option<BufReader<Counted>>,
}

impl Reply {
    fn of(exchange: &Shared) -> Reply {
        Reply { exchange: Shared(exchange.0.clone()), body: None }
    }
}

impl BufRead for Reply {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.body.is_none() {
            let mut exchange = self.exchange.0.borrow_mut();
            if !exchange.is_done {
                exchange.perform()?;
            }
            self.body = exchange.body.take();
        }
        match &mut self.body {
            Some(body) => body.fill_buf(),
            None => Ok(&[]),
        }
    }

    fn consume(&mut self, bytes: usize) {
        if let Some(body) = &mut self.body {
            body.consume(bytes);
        }
    }
}

impl Read for Reply {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_told_now_and_then_and_bounded_and_nothing_comes_when_it_is_stopped() {
        let (say, mut heard) = mpsc::unbounded_channel();
        let stop = Arc::new(AtomicBool::new(false));
        let meter = Meter::new(say, stop.clone());
        for _ in 0..limits::GIT_TOLD {
            meter.count(2).unwrap();
        }
        assert_eq!((heard.try_recv(), heard.try_recv()), (Ok(limits::GIT_TOLD), Ok(2 * limits::GIT_TOLD)));
        assert!(heard.try_recv().is_err());
        let trouble = |error: io::Error| error.get_ref()?.downcast_ref::<Trouble>().cloned();
        let all = usize::try_from(limits::GIT_DOWNLOAD).unwrap();
        assert_eq!(meter.count(all).map_err(trouble), Err(Some(Trouble::TooLarge)));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(meter.count(0).map_err(trouble), Err(Some(Trouble::Stopped)));
    }
}
