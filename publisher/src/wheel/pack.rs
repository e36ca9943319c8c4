//! A folder with a `pyproject.toml` → wheel. No build tool runs: `[project]` (PEP 621) and the code are all
//! there is to it, so it works the same everywhere.

use std::collections::BTreeMap;

use mpypi_protocol::{FilePath, wheel::normalized_name};
use toml::{Table, Value};

use super::{Contents, Headers, Wheel, WheelError, check_name, value, version};
use crate::{
    limits,
    walk::{self, Found},
    wheel::archive::ArchiveError,
};

/// The tag of a wheel that runs on any interpreter and machine.
pub const ANY: &str = "py3-none-any";

const FILE: &str = "pyproject.toml";

/// Packs a project, as [`contents`] and [`Contents::write`] do.
///
/// # Errors
/// See [`WheelError`].
pub fn pack(files: &[Found], tag: &str) -> Result<Wheel, WheelError> {
    contents(files, tag)?.write()
}

/// What goes into the wheel of a project. `files` are those of its folder that count, with names relative to it; `tag` is the
/// compatibility tag.
///
/// # Errors
/// See [`WheelError`].
pub fn contents(files: &[Found], tag: &str) -> Result<Contents, WheelError> {
    let project = files.iter().find(|file| file.name == FILE);
    let project = project.ok_or_else(|| WheelError::Missing { path: FILE.to_owned() })?;
    let text = String::from_utf8(read(project)?).map_err(|_| WheelError::NotUtf8 { file: FILE })?;
    let metadata = metadata(&text)?;
    let name = metadata.iter().find(|(key, _)| key == "Name").map_or("", |(_, name)| name);

    let mut code = BTreeMap::new();
    let mut total = 0;
    for (file, path) in code_files(files, name)? {
        let content = read(file)?;
        total += content.len() as u64;
        if total > limits::WHEEL_UNPACKED {
            let what = "the files of the wheel are";
            return Err(ArchiveError::TooLarge { what, limit: limits::WHEEL_UNPACKED }.into());
        }
        code.insert(FilePath::new(path)?, content);
    }
    let wheel = [("Wheel-Version", "1.0"), ("Generator", "mpypi"), ("Root-Is-Purelib", "true"), ("Tag", tag)];
    let wheel = wheel.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    Ok(Contents { files: code, metadata, wheel, more: BTreeMap::new() })
}

fn read(file: &Found) -> Result<Vec<u8>, WheelError> {
    if file.size > limits::INPUT {
        return Err(ArchiveError::TooLarge { what: "a file of the wheel is", limit: limits::INPUT }.into());
    }
    walk::read(&file.path)
        .map_err(|source| WheelError::Read { path: file.path.display().to_string(), source })
}

/// The code of project `name` and where it is installed: the folder or module of that name, flat or below
/// `src/`.
fn code_files<'a>(files: &'a [Found], name: &str) -> Result<Vec<(&'a Found, &'a str)>, WheelError> {
    let module = normalized_name(name);
    let places = [
        ("src/", format!("src/{module}/")),
        ("", format!("{module}/")),
        ("src/", format!("src/{module}.py")),
        ("", format!("{module}.py")),
    ];
    let belongs = |file: &Found, place: &str| match place.ends_with('/') {
        true => file.name.starts_with(place),
        false => file.name == place,
    };
    let found: Vec<_> =
        places.iter().filter(|(_, place)| files.iter().any(|file| belongs(file, place))).collect();
    let names = |places: &[&(&str, String)]| places.iter().map(|(_, place)| place.clone()).collect();
    match found.as_slice() {
        [] => Err(WheelError::NoCode { places: names(&places.each_ref()) }),
        [(root, place)] => Ok(files
            .iter()
            .filter(|file| belongs(file, place))
            .map(|file| (file, &file.name[root.len()..]))
            .collect()),
        several => Err(WheelError::Ambiguous { places: names(several) }),
    }
}

/// What METADATA says about the project, from `[project]`.
fn metadata(text: &str) -> Result<Headers, WheelError> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        WheelError::Toml { problem: format!("line {line}: {}", error.message().replace('\n', ", ")) }
    })?;
    let project = table.get("project").and_then(Value::as_table).ok_or(WheelError::NoProject)?;
    let dynamic = project.get("dynamic").and_then(Value::as_array).into_iter().flatten();
    let dynamic: Vec<&str> = dynamic.filter_map(Value::as_str).collect();
    for key in ["name", "version"] {
        if dynamic.contains(&key) {
            return Err(WheelError::Dynamic { key });
        }
    }
    let required = |key| text_of(project, key)?.ok_or_else(|| value(FILE, key, "is missing"));
    let name = required("name")?;
    check_name(&name).map_err(|problem| value(FILE, "name", problem))?;
    let version = required("version")?;
    version::check(&version).map_err(|problem| value(FILE, "version", problem))?;

    let mut headers = vec![("Metadata-Version", "2.1".to_owned()), ("Name", name), ("Version", version)];
    headers.extend(text_of(project, "description")?.map(|text| ("Summary", text)));
    headers.extend(text_of(project, "requires-python")?.map(|text| ("Requires-Python", text)));
    if let Some(dependencies) = project.get("dependencies") {
        let wrong = || value(FILE, "dependencies", "should be an array of texts");
        for dependency in dependencies.as_array().ok_or_else(wrong)? {
            let dependency = dependency.as_str().ok_or_else(wrong)?;
            headers.push(("Requires-Dist", one_line("dependencies", dependency)?));
        }
    }
    Ok(headers.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

fn text_of(project: &Table, key: &'static str) -> Result<Option<String>, WheelError> {
    match project.get(key) {
        None => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() && key == "description" => Ok(None),
        Some(Value::String(text)) => one_line(key, text).map(Some),
        Some(_) => Err(value(FILE, key, "should be a text in quotes")),
    }
}

fn one_line(key: &str, text: &str) -> Result<String, WheelError> {
    match text.trim() {
        "" => Err(value(FILE, key, "is empty")),
        text if text.contains(char::is_control) => Err(value(FILE, key, "should be one line")),
        text => Ok(text.to_owned()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mpypi_protocol::Digest;

    use super::*;
    use crate::{
        walk::{tests::folder, walk},
        wheel::archive,
    };

    pub(crate) const PROJECT: &str = "[project]\nname = \"Blink-Led\"\nversion = \"1.4.0\"\n";

    pub(crate) fn packed(files: &[(&str, &str)]) -> Result<Wheel, WheelError> {
        let folder = folder(files);
        pack(&walk(folder.path(), &[], |_| true).unwrap().files, ANY)
    }

    pub(crate) fn file(wheel: &Wheel, name: &str) -> String {
        let files = archive::read(&wheel.bytes).unwrap();
        String::from_utf8(files[&FilePath::new(name).unwrap()].clone()).unwrap()
    }

    fn names(wheel: &Wheel) -> Vec<String> {
        archive::read(&wheel.bytes).unwrap().into_keys().map(|path| path.to_string()).collect()
    }

    #[test]
    fn the_same_files_give_the_same_wheel_on_any_machine_and_day() {
        let wheel = packed(&[
            (FILE, PROJECT),
            ("blink_led/__init__.py", "def blink():\n    print('blink')\n"),
            ("blink_led/colours.json", "[\"red\", \"green\", \"red\", \"green\", \"red\", \"green\"]\n"),
        ])
        .unwrap();
        // A golden digest: it changes only if our form does, and then every device downloads every wheel again.
        let golden = "6976d9b7b74945ec780fb6745d49321beb1cc858073bd6f8adc665ff83d7c61c";
        assert_eq!(Digest::of(&wheel.bytes).to_string(), golden);
    }

    #[test]
    fn metadata_and_wheel_hold_header_lines_and_nothing_else() {
        let project = "[project]\nname = \"blink\"\nversion = \"1.0\"\ndescription = \"Blinks: fast\"\n\
                       requires-python = \">=3.4\"\ndependencies = [\"umqtt.simple\", \"a>1; python_version < '4'\"]\n\
                       readme = \"README.md\"\n";
        let wheel = packed(&[(FILE, project), ("blink.py", "")]).unwrap();
        assert_eq!(
            file(&wheel, "blink-1.0.dist-info/METADATA"),
            "Metadata-Version: 2.1\nName: blink\nVersion: 1.0\nSummary: Blinks: fast\nRequires-Python: >=3.4\n\
             Requires-Dist: umqtt.simple\nRequires-Dist: a>1; python_version < '4'\n"
        );
        assert_eq!(
            file(&wheel, "blink-1.0.dist-info/WHEEL"),
            "Wheel-Version: 1.0\nGenerator: mpypi\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        );
    }

    #[test]
    fn record_lists_every_file_in_the_order_of_the_archive_itself_last() {
        let wheel = packed(&[(FILE, PROJECT), ("blink_led/b.py", "b"), ("blink_led/a/c.py", "c")]).unwrap();
        let record = file(&wheel, "blink_led-1.4.0.dist-info/RECORD");
        let names: Vec<_> = record.lines().map(|line| line.split(',').next().unwrap()).collect();
        let info = |name| format!("blink_led-1.4.0.dist-info/{name}");
        assert_eq!(
            names,
            ["blink_led/a/c.py", "blink_led/b.py", &info("METADATA"), &info("WHEEL"), &info("RECORD")]
        );
        assert!(
            record.ends_with("RECORD,,\n")
                && !record.contains("\n\n")
                && !record.contains('='.to_string().repeat(2).as_str())
        );
        let at = |name: &str| wheel.bytes.windows(name.len()).position(|w| w == name.as_bytes()).unwrap();
        assert!(names.windows(2).all(|pair| at(pair[0]) < at(pair[1])));
    }

    #[test]
    fn code_is_found_flat_below_src_and_as_a_module() {
        let expected = |code: &str| {
            let info = ["METADATA", "RECORD", "WHEEL"].map(|f| format!("blink_led-1.4.0.dist-info/{f}"));
            [info.as_slice(), &[code.to_owned()]].concat()
        };
        let packed = |name| names(&packed(&[(FILE, PROJECT), (name, "x"), ("tests/t.py", "x")]).unwrap());
        assert_eq!(packed("blink_led/x.py"), expected("blink_led/x.py"));
        assert_eq!(packed("src/blink_led/x.py"), expected("blink_led/x.py"));
        assert_eq!(packed("blink_led.py"), expected("blink_led.py"));
        assert_eq!(packed("src/blink_led.py"), expected("blink_led.py"));
    }

    #[test]
    fn code_in_no_place_or_in_two_is_an_error() {
        let none = packed(&[(FILE, PROJECT), ("led.py", "")]).unwrap_err();
        assert!(none.to_string().contains("`blink_led/`"), "{none}");
        let two = packed(&[(FILE, PROJECT), ("blink_led.py", ""), ("src/blink_led/a.py", "")]).unwrap_err();
        assert!(matches!(two, WheelError::Ambiguous { .. }), "{two}");
    }

    #[test]
    fn what_only_a_build_tool_can_tell_is_refused_with_a_hint() {
        let project = "[project]\nname = \"a\"\ndynamic = [\"version\"]\n";
        let error = packed(&[(FILE, project), ("a.py", "")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`version` in pyproject.toml is dynamic: only a build tool can tell it"
        );
        assert!(error.hint().is_some());
        assert!(matches!(packed(&[(FILE, "[tool.poetry]\n")]), Err(WheelError::NoProject)));
    }

    #[test]
    fn values_that_mpy_blox_could_not_read_are_refused() {
        for line in [
            "name = \"a\"\nversion = \"1.x\"",
            "name = \"a\"\nversion = 1",
            "name = \"-a\"\nversion = \"1\"",
            "name = \"a\"",
            "name = \"a\"\nversion = \"1\"\ndescription = \"two\\nlines\"",
            "name = \"a\"\nversion = \"1\"\ndependencies = [\"\"]",
        ] {
            let error = packed(&[(FILE, &format!("[project]\n{line}\n")), ("a.py", "")]).unwrap_err();
            assert!(matches!(error, WheelError::Value { .. }), "{line}: {error}");
        }
        let comma = packed(&[(FILE, PROJECT), ("blink_led/a,b.py", "")]).unwrap_err();
        assert!(matches!(comma, WheelError::Name { character: ',', .. }), "{comma}");
    }
}
