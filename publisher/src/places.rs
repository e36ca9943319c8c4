//! Where the files of a release go on a device. Two that want one place make a release that no device can
//! install: better to hear of it before it is published.

use std::collections::BTreeMap;

use mpypi_protocol::{Digest, FilePath};

/// Every file of a release, by its path on the device.
#[derive(Debug, Default)]
pub struct Places {
    files: BTreeMap<FilePath, Vec<Bringer>>,
}

#[derive(Debug)]
struct Bringer {
    /// The file or project, for people.
    from: String,
    /// The wheel's normalised name, and its tag. A device takes one wheel of each name.
    wheel: Option<(String, String)>,
    digest: Digest,
}

/// Two files want one place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Both bring it, with different content.
    #[error("`{one}` and `{other}` both bring `{path}`, with different content")]
    Twice {
        /// One file or project.
        one: String,
        /// The other.
        other: String,
        /// The path on the device.
        path: FilePath,
    },
    /// One brings a file where the other needs a folder.
    #[error("`{one}` brings `{path}`, which `{other}` needs as a folder")]
    FileAndFolder {
        /// What brings the file.
        one: String,
        /// What needs the folder.
        other: String,
        /// The path on the device.
        path: FilePath,
    },
}

impl Places {
    /// Notes that `from` brings the file at `path`; `wheel` is the normalised name and the tag if it is a wheel.
    pub fn add(&mut self, path: FilePath, from: &str, wheel: Option<(&str, &str)>, digest: Digest) {
        let wheel = wheel.map(|(name, tag)| (name.to_owned(), tag.to_owned()));
        let bringer = Bringer { from: from.to_owned(), wheel, digest };
        self.files.entry(path).or_default().push(bringer);
    }

    /// Whether a device can have all of them; what people should know if it can, one sentence each.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn check(&self) -> Result<Vec<String>, PlaceError> {
        let mut folded: BTreeMap<String, &FilePath> = BTreeMap::new();
        let mut warnings = Vec::new();
        for (path, bringers) in &self.files {
            for (index, one) in bringers.iter().enumerate() {
                let rest = &bringers[index + 1..];
                if let Some(other) = rest.iter().find(|other| one.meets(other) && one.digest != other.digest)
                {
                    let (one, other) = (one.from.clone(), other.from.clone());
                    return Err(PlaceError::Twice { one, other, path: path.clone() });
                }
            }
            for folder in path.parents() {
                let file = FilePath::new(folder).ok().filter(|folder| self.files.contains_key(folder));
                let Some(file) = file else { continue };
                let pairs = self.files[&file].iter().flat_map(|one| bringers.iter().map(move |o| (one, o)));
                if let Some((one, other)) = pairs.into_iter().find(|(one, other)| one.meets(other)) {
                    let (one, other) = (one.from.clone(), other.from.clone());
                    return Err(PlaceError::FileAndFolder { one, other, path: file });
                }
            }
            // MicroPython looks for the source first (docs.micropython.org, "MicroPython .mpy files").
            let source =
                path.as_str().strip_suffix(".mpy").and_then(|stem| FilePath::new(format!("{stem}.py")).ok());
            if let Some((source, sources)) = source.and_then(|source| self.files.get_key_value(&source))
                && let Some(one) = sources.iter().find(|one| bringers.iter().any(|other| one.meets(other)))
            {
                let from = &one.from;
                warnings
                    .push(format!("`{source}` of `{from}` hides `{path}`: devices never load the latter"));
            }
            if let Some(other) = folded.insert(path.as_str().to_lowercase(), path) {
                warnings.push(format!(
                    "`{other}` and `{path}` are one file on devices whose file system ignores case, as FAT does"
                ));
            }
        }
        Ok(warnings)
    }
}

impl Bringer {
    /// Whether one device can get both: not of two wheels of one name, which differ in their tag.
    fn meets(&self, other: &Bringer) -> bool {
        match (&self.wheel, &other.wheel) {
            (Some((one, its_tag)), Some((other, other_tag))) => one != other || its_tag == other_tag,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(files: &[(&str, &str, Option<(&str, &str)>, &str)]) -> Result<Vec<String>, String> {
        let mut places = Places::default();
        for (path, from, wheel, content) in files {
            places.add(FilePath::new(*path).unwrap(), from, *wheel, Digest::of(content.as_bytes()));
        }
        places.check().map_err(|error| error.to_string())
    }

    #[test]
    fn one_place_can_be_wanted_twice_only_for_the_same_content() {
        let wheel = ("lib/a.py", "wheels/a", Some(("a", "py3-none-any")), "1");
        assert_eq!(check(&[wheel, ("lib/a.py", "src/lib/a.py", None, "1")]), Ok(vec![]));
        assert_eq!(
            check(&[wheel, ("lib/a.py", "src/lib/a.py", None, "2")]).unwrap_err(),
            "`wheels/a` and `src/lib/a.py` both bring `lib/a.py`, with different content"
        );
        assert!(check(&[wheel, ("lib/a.py", "wheels/b", Some(("b", "py3-none-any")), "2")]).is_err());
        let for_another_platform = ("lib/a.py", "wheels/a", Some(("a", "py3-none-esp32")), "2");
        assert_eq!(check(&[wheel, for_another_platform]), Ok(vec![]));
    }

    #[test]
    fn a_file_cannot_be_where_another_needs_a_folder() {
        assert_eq!(
            check(&[
                ("lib/a", "src/lib/a", None, "1"),
                ("lib/a/b.py", "wheels/a", Some(("a", "py3-none-any")), "1")
            ])
            .unwrap_err(),
            "`src/lib/a` brings `lib/a`, which `wheels/a` needs as a folder"
        );
    }

    #[test]
    fn names_that_differ_in_case_alone_are_worth_a_warning() {
        let warnings = check(&[("Main.py", "src/Main.py", None, "1"), ("main.py", "src/main.py", None, "2")]);
        assert_eq!(warnings.unwrap().len(), 1);
    }

    #[test]
    fn source_that_hides_bytecode_is_worth_a_warning() {
        let bytecode = ("lib/a.mpy", "wheels/a", Some(("a", "mpy6-bytecode-any")), "1");
        let warnings = check(&[bytecode, ("lib/a.py", "src/lib/a.py", None, "2")]).unwrap();
        assert_eq!(
            warnings,
            ["`lib/a.py` of `src/lib/a.py` hides `lib/a.mpy`: devices never load the latter"]
        );
        let source = ("lib/a.py", "wheels/a", Some(("a", "py3-none-any")), "2");
        assert_eq!(check(&[bytecode, source]), Ok(vec![]), "no device gets both");
    }
}
