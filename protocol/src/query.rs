//! The language of `only`: which nodes a rollout is for, by what each says of itself.
//!
//! ```text
//! query      = all { "or" all }
//! all        = one { "and" one }
//! one        = "not" one | "(" query ")" | field operator value
//! field      = "node" | "runtime" | "channel" | "version" | "sequence" | "agent" | "firmware" | "label." name
//! operator   = "=" | "!=" | "<" | "<=" | ">" | ">=" | "~"
//! value      = "'" { any but ' } "'" | '"' { any but " } '"' | word
//! ```
//! A word, a field among them, is a run of characters other than white space and `' " ( ) = ! < > ~`; `and`, `or` and
//! `not` are no words. White space is space, tab, carriage return and line feed.
//!
//! - Two texts that each begin with a version (`v` or not, then numbers joined by dots) compare by these numbers, as PEP 440 compares
//!   release segments: `1.10` is after `1.9`, `1.3` is `1.3.0`; what follows the numbers does not count. Other texts
//!   compare as text, byte by byte. That is for `<`, `<=`, `>` and `>=`.
//! - `=` holds for equal texts, and for versions that are nothing but numbers and equal as numbers. `!=` is its opposite.
//! - `~` matches the whole text with a pattern: `*` is any run of characters, `?` any one.
//! - A comparison with what the node does not say is false, `!=` too.

use std::{borrow::Cow, cmp::Ordering, collections::BTreeMap, fmt, str::FromStr};

use crate::{limits, node::Info};

/// A query that can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    text: String,
    root: Term,
}

/// What a query is about: one node, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts<'a> {
    /// Its name.
    pub node: Cow<'a, str>,
    /// What it runs, as a tag says it: `mpy6_3-xtensawin-esp32`.
    pub runtime: Option<Cow<'a, str>>,
    /// The channel it follows.
    pub channel: Option<Cow<'a, str>>,
    /// The version of the release that runs.
    pub version: Option<Cow<'a, str>>,
    /// The sequence of the release that runs.
    pub sequence: Option<u64>,
    /// Its agent, as `mpypi-agent/0.1.0`.
    pub agent: Option<Cow<'a, str>>,
    /// The version of its interpreter or system: `uname.version` of its info.
    pub firmware: Option<Cow<'a, str>>,
    /// What it is labelled with.
    pub labels: Cow<'a, BTreeMap<String, String>>,
}

/// Why a text is no query. Offsets are in bytes, from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// Longer than [`limits::QUERY`].
    #[error("a query of {0} bytes is longer than {limit}", limit = limits::QUERY)]
    TooLong(usize),
    /// Parentheses or `not`, more than [`limits::QUERY_DEPTH`] inside each other.
    #[error("more than {limit} levels at {0}", limit = limits::QUERY_DEPTH)]
    TooDeep(usize),
    /// Something else was to come.
    #[error("{expected} should be at {at}, not {found}")]
    Expected {
        /// What was to come.
        expected: &'static str,
        /// Where.
        at: usize,
        /// What is there.
        found: String,
    },
    /// A field that no node has.
    #[error(
        "`{0}` is no field: use node, runtime, channel, version, sequence, agent, firmware or `label.<name>`"
    )]
    Field(String),
    /// A quotation mark without its other.
    #[error("the text in quotes at {0} does not end")]
    Quote(usize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    Any(Vec<Term>),
    All(Vec<Term>),
    Not(Box<Term>),
    Is(Field, Operator, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Field {
    Node,
    Runtime,
    Channel,
    Version,
    Sequence,
    Agent,
    Firmware,
    Label(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Matches,
}

impl Query {
    /// The query as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the query holds for a node.
    #[must_use]
    pub fn holds(&self, facts: &Facts<'_>) -> bool {
        self.root.holds(facts)
    }
}

impl FromStr for Query {
    type Err = QueryError;

    fn from_str(text: &str) -> Result<Query, QueryError> {
        if text.len() > limits::QUERY {
            return Err(QueryError::TooLong(text.len()));
        }
        let mut reader = Reader { text, at: 0, depth: 0 };
        let root = reader.any()?;
        match reader.peek()? {
            Token::End => Ok(Query { text: text.to_owned(), root }),
            _ => Err(reader.expected("`and`, `or` or the end")),
        }
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'a> Facts<'a> {
    /// What `node` says of itself, running the release `running` (sequence and version).
    #[must_use]
    pub fn of(node: &'a str, info: &'a Info, running: (Option<u64>, Option<&'a str>)) -> Facts<'a> {
        Facts {
            node: node.into(),
            runtime: Some(info.runtime().to_string().into()),
            channel: info.channel.as_ref().map(|channel| channel.as_str().into()),
            version: running.1.map(Cow::from),
            sequence: running.0,
            agent: info.agent.as_deref().map(Cow::from),
            firmware: Some(info.uname.version.as_str().into()),
            labels: Cow::Borrowed(&info.labels),
        }
    }

    fn get(&self, field: &Field) -> Option<Cow<'_, str>> {
        match field {
            Field::Node => Some(Cow::Borrowed(&self.node)),
            Field::Runtime => self.runtime.as_deref().map(Cow::from),
            Field::Channel => self.channel.as_deref().map(Cow::from),
            Field::Version => self.version.as_deref().map(Cow::from),
            Field::Sequence => self.sequence.map(|sequence| sequence.to_string().into()),
            Field::Agent => self.agent.as_deref().map(Cow::from),
            Field::Firmware => self.firmware.as_deref().map(Cow::from),
            Field::Label(name) => self.labels.get(name).map(|value| value.as_str().into()),
        }
    }
}

impl Term {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        match self {
            Term::Any(terms) => terms.iter().any(|term| term.holds(facts)),
            Term::All(terms) => terms.iter().all(|term| term.holds(facts)),
            Term::Not(term) => !term.holds(facts),
            Term::Is(field, operator, value) => {
                facts.get(field).is_some_and(|fact| operator.holds(&fact, value))
            }
        }
    }
}

impl Operator {
    fn holds(self, fact: &str, value: &str) -> bool {
        match self {
            Operator::Equal => equal(fact, value),
            Operator::NotEqual => !equal(fact, value),
            Operator::Less => order(fact, value).is_lt(),
            Operator::LessOrEqual => order(fact, value).is_le(),
            Operator::Greater => order(fact, value).is_gt(),
            Operator::GreaterOrEqual => order(fact, value).is_ge(),
            Operator::Matches => matches(fact, value),
        }
    }
}

fn equal(one: &str, other: &str) -> bool {
    one == other
        || match (release_segment(one), release_segment(other)) {
            (Some((one, "")), Some((other, ""))) => compare_segments(one, other).is_eq(),
            _ => false,
        }
}

fn order(one: &str, other: &str) -> Ordering {
    match (release_segment(one), release_segment(other)) {
        (Some((one, _)), Some((other, _))) => compare_segments(one, other),
        _ => one.cmp(other),
    }
}

/// The numbers joined by dots that a text begins with, after a `v` if there is one, and what follows.
fn release_segment(text: &str) -> Option<(&str, &str)> {
    let numbers = text.strip_prefix('v').unwrap_or(text);
    let mut end = 0;
    loop {
        let rest = &numbers[end..];
        let number = if end == 0 { rest } else { rest.strip_prefix('.').unwrap_or_default() };
        let digits = number.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            break;
        }
        end += rest.len() - number.len() + digits;
    }
    (end > 0).then(|| numbers.split_at(end))
}

/// PEP 440: release segments compare number by number, the shorter filled up with zeros.
fn compare_segments(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        let (a, b) = match (one.next(), other.next()) {
            (None, None) => return Ordering::Equal,
            (a, b) => (a.unwrap_or_default(), b.unwrap_or_default()),
        };
        // However many digits: the one with more of them is the greater.
        let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
        let order = a.len().cmp(&b.len()).then_with(|| a.cmp(b));
        if order.is_ne() {
            return order;
        }
    }
}

/// Whether all of `text` is as `pattern` says. At a mismatch only the last `*` takes one character more, so the time is bounded
/// by the product of the lengths.
fn matches(text: &str, pattern: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let pattern: Vec<char> = pattern.chars().collect();
    let (mut t, mut p) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, t) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    And,
    Or,
    Not,
    Open,
    Close,
    Operator(Operator),
    Word(&'a str),
    Quoted(&'a str),
    /// `!` alone.
    Stray,
    End,
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a> {
    fn any(&mut self) -> Result<Term, QueryError> {
        let mut terms = vec![self.all()?];
        while self.peek()? == Token::Or {
            self.take()?;
            terms.push(self.all()?);
        }
        Ok(if terms.len() == 1 { terms.remove(0) } else { Term::Any(terms) })
    }

    fn all(&mut self) -> Result<Term, QueryError> {
        let mut terms = vec![self.one()?];
        while self.peek()? == Token::And {
            self.take()?;
            terms.push(self.one()?);
        }
        Ok(if terms.len() == 1 { terms.remove(0) } else { Term::All(terms) })
    }

    fn one(&mut self) -> Result<Term, QueryError> {
        match self.peek()? {
            Token::Not => {
                self.down()?;
                let term = self.one()?;
                self.depth -= 1;
                Ok(Term::Not(Box::new(term)))
            }
            Token::Open => {
                self.down()?;
                let term = self.any()?;
                if self.peek()? != Token::Close {
                    return Err(self.expected("`)`"));
                }
                self.take()?;
                self.depth -= 1;
                Ok(term)
            }
            Token::Word(name) => {
                let field = Field::named(name)?;
                self.take()?;
                let Token::Operator(operator) = self.peek()? else {
                    return Err(self.expected("one of `= != < <= > >= ~`"));
                };
                self.take()?;
                let (Token::Word(value) | Token::Quoted(value)) = self.peek()? else {
                    return Err(self.expected("a value"));
                };
                self.take()?;
                Ok(Term::Is(field, operator, value.to_owned()))
            }
            _ => Err(self.expected("a field, `not` or `(`")),
        }
    }

    /// Takes `not` or `(`: one level deeper.
    fn down(&mut self) -> Result<(), QueryError> {
        self.depth += 1;
        if self.depth > limits::QUERY_DEPTH {
            return Err(QueryError::TooDeep(self.start()));
        }
        self.take().map(drop)
    }

    fn peek(&self) -> Result<Token<'a>, QueryError> {
        Ok(self.token()?.0)
    }

    fn take(&mut self) -> Result<Token<'a>, QueryError> {
        let (token, end) = self.token()?;
        self.at = end;
        Ok(token)
    }

    /// Where the next token starts.
    fn start(&self) -> usize {
        let rest = &self.text[self.at..];
        self.text.len() - rest.trim_start_matches(is_space).len()
    }

    /// The next token, and where it ends.
    fn token(&self) -> Result<(Token<'a>, usize), QueryError> {
        let start = self.start();
        let rest = &self.text[start..];
        let mut characters = rest.chars();
        let Some(first) = characters.next() else { return Ok((Token::End, start)) };
        let equals = characters.next() == Some('=');
        let (token, length) = match (first, equals) {
            ('(', _) => (Token::Open, 1),
            (')', _) => (Token::Close, 1),
            ('=', _) => (Token::Operator(Operator::Equal), 1),
            ('!', true) => (Token::Operator(Operator::NotEqual), 2),
            ('!', false) => (Token::Stray, 1),
            ('<', true) => (Token::Operator(Operator::LessOrEqual), 2),
            ('<', false) => (Token::Operator(Operator::Less), 1),
            ('>', true) => (Token::Operator(Operator::GreaterOrEqual), 2),
            ('>', false) => (Token::Operator(Operator::Greater), 1),
            ('~', _) => (Token::Operator(Operator::Matches), 1),
            ('\'' | '"', _) => {
                let inside = rest[1..].split_once(first).ok_or(QueryError::Quote(start))?.0;
                (Token::Quoted(inside), inside.len() + 2)
            }
            _ => {
                let end = rest.find(|c| is_space(c) || "'\"()=!<>~".contains(c)).unwrap_or(rest.len());
                let token = match &rest[..end] {
                    "and" => Token::And,
                    "or" => Token::Or,
                    "not" => Token::Not,
                    word => Token::Word(word),
                };
                (token, end)
            }
        };
        Ok((token, start + length))
    }

    fn expected(&self, expected: &'static str) -> QueryError {
        let at = self.start();
        let found = match self.token() {
            Ok((Token::End, _)) => "the end".to_owned(),
            Ok((_, end)) => format!("`{}`", self.text[at..end].replace(char::is_control, "?")),
            Err(error) => return error,
        };
        QueryError::Expected { expected, at, found }
    }
}

impl Field {
    fn named(name: &str) -> Result<Field, QueryError> {
        Ok(match name {
            "node" => Field::Node,
            "runtime" => Field::Runtime,
            "channel" => Field::Channel,
            "version" => Field::Version,
            "sequence" => Field::Sequence,
            "agent" => Field::Agent,
            "firmware" => Field::Firmware,
            _ => match name.strip_prefix("label.").filter(|label| !label.is_empty()) {
                Some(label) => Field::Label(label.to_owned()),
                None => return Err(QueryError::Field(name.to_owned())),
            },
        })
    }
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn and_binds_closer_than_or_and_not_closest() {
        let query: Query = "node=a or node=b and not node=b or node=c".parse().unwrap();
        let holds = |node: &'static str| query.holds(&Facts { node: node.into(), ..Facts::default() });
        assert_eq!([holds("a"), holds("b"), holds("c")], [true, false, true]);
    }

    #[test]
    fn a_pattern_of_many_stars_takes_no_exponential_time() {
        let text = "a".repeat(limits::QUERY);
        assert!(!matches(&text, &("*a".repeat(100) + "b")));
        assert!(matches(&text, &"*a".repeat(100)));
    }

    #[test]
    fn numbers_of_any_length_compare() {
        let long = "9".repeat(100);
        assert!(order(&long, "18446744073709551616").is_gt());
        assert!(equal("v1.0", "1") && !equal("1.0-x", "1"));
        assert!(order("1.3rc1", "1.3").is_eq(), "what follows the numbers does not count");
        assert!(order("x1", "10").is_gt(), "no version: as text");
        assert_eq!(release_segment("1..2"), Some(("1", "..2")));
        assert_eq!((release_segment("v"), release_segment(".1"), release_segment("")), (None, None, None));
    }
}
