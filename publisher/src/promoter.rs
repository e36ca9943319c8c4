//! `.promoterignore`, as ota-promoter reads it: one regular expression a line, for the whole path.

use regex::Regex;

/// The patterns of one `.promoterignore`.
#[derive(Debug, Clone, Default)]
pub struct PromoterIgnore {
    patterns: Vec<Regex>,
}

impl PromoterIgnore {
    /// The name of the file, in the root of what is served.
    pub const FILE: &'static str = ".promoterignore";

    /// Reads the patterns. Those that are no regular expressions ignore nothing and are returned beside.
    #[must_use]
    pub fn parse(text: &str) -> (PromoterIgnore, Vec<String>) {
        let mut invalid = Vec::new();
        let mut patterns = Vec::new();
        // One pattern a line, trimmed, blank lines skipped. No comments: `# x` is a pattern.
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            // Plain concatenation: `x.py|foo` means "starts with x.py, or ends with foo".
            match Regex::new(&from_re2(&format!("^{line}$"))) {
                Ok(regex) => patterns.push(regex),
                Err(_) => invalid.push(line.to_owned()),
            }
        }
        (PromoterIgnore { patterns }, invalid)
    }

    /// Whether the file at `path`, relative to the root, is left out.
    #[must_use]
    pub fn ignores(&self, path: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.is_match(path))
    }
}

/// Go's RE2 syntax in this crate's: there `\d`, `\s` and `\w` are ASCII, and `[`, `&` and `~` are plain
/// letters inside a class.
fn from_re2(pattern: &str) -> String {
    let mut regex = String::with_capacity(pattern.len() + 16);
    let mut characters = pattern.chars().peekable();
    let mut in_class = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some('d') => regex += "[0-9]",
                Some('D') => regex += "[^0-9]",
                Some('w') => regex += "[0-9A-Za-z_]",
                Some('W') => regex += "[^0-9A-Za-z_]",
                Some('s') => regex += r"[\t\n\f\r ]",
                Some('S') => regex += r"[^\t\n\f\r ]",
                Some('b') => regex += r"(?-u:\b)",
                Some(other) => regex.extend(['\\', other]),
                None => regex.push('\\'),
            },
            '[' if !in_class => {
                in_class = true;
                regex.push('[');
                regex.extend(characters.next_if_eq(&'^'));
                // First in a class, `]` is a plain letter.
                if characters.next_if_eq(&']').is_some() {
                    regex += r"\]";
                }
            }
            '[' if characters.peek() != Some(&':') => regex += r"\[",
            '[' => {
                regex.push('[');
                for inner in characters.by_ref() {
                    regex.push(inner);
                    if inner == ']' {
                        break;
                    }
                }
            }
            ']' => {
                in_class = false;
                regex.push(']');
            }
            '&' | '~' if in_class => regex.extend(['\\', character]),
            _ => regex.push(character),
        }
    }
    regex
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ignores(text: &str, path: &str) -> bool {
        PromoterIgnore::parse(text).0.ignores(path)
    }

    #[test]
    fn a_name_ignores_no_folder_but_its_content_can_be_ignored() {
        assert!(!ignores("a", "a/x.py"));
        assert!(ignores("a", "a"));
        assert!(ignores("a/.*", "a/x.py"));
    }

    #[test]
    fn a_pattern_crosses_folders() {
        assert!(ignores(r".*\.py", "a/b/c.py"));
        assert!(!ignores(r".*\.py", "a/b/c.pyc"));
    }

    #[test]
    fn alternatives_are_concatenated_plainly() {
        assert!(ignores("x.py|foo", "x.py.bak"));
        assert!(ignores("x.py|foo", "a/foo"));
        assert!(!ignores("x.py|foo", "a/x.py"));
    }

    #[test]
    fn there_are_no_comments_and_blank_lines_mean_nothing() {
        assert!(ignores("# x", "# x"));
        assert!(!ignores("\n   \n", ""));
        assert!(ignores("  a.txt  ", "a.txt"));
    }

    #[test]
    fn flags_work_and_classes_are_ascii() {
        assert!(ignores("(?i)readme.md", "README.MD"));
        assert!(ignores("caf.", "café"));
        assert!(ignores(r"\d+", "12") && !ignores(r"\d+", "١٢"));
        assert!(ignores(r"[\w-]+", "a-b_c") && !ignores(r"\w+", "é"));
        assert!(ignores("[[]x[]]", "[x]"));
        assert!(ignores("[[:alpha:]]+", "abc"));
        assert!(ignores("a[&&]b", "a&b"));
    }

    #[test]
    fn an_invalid_pattern_ignores_nothing_and_is_reported() {
        let (patterns, invalid) = PromoterIgnore::parse("(\n.*\\.md\n");
        assert_eq!(invalid, ["("]);
        assert!(patterns.ignores("a.md") && !patterns.ignores("("));
    }
}
