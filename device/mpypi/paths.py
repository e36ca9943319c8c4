"""Names: of files that stay inside a device's root, and of packages.

Texts are looked at byte by byte: MicroPython keeps every single character that a text is taken apart to, for
ever.
"""

from . import limits


def check_path(path):
    """Raises `ValueError` unless `path` names a file inside the device's root: the rules and texts of
    protocol/src/path.rs."""
    if not path:
        raise ValueError("a path must not be empty")
    data = path.encode()
    if len(data) > limits.PATH:
        raise ValueError("a path of %d bytes is longer than %d" % (len(data), limits.PATH))
    components = data.count(b"/") + 1
    if components > limits.PATH_COMPONENTS:
        raise ValueError("a path of %d components has more than %d" % (components, limits.PATH_COMPONENTS))
    if has_control(data) or b"\\" in data or b":" in data:
        raise ValueError("path `%s` has a character which not every device can store" % path)
    names = data.split(b"/")
    for name in names:
        if name in (b"", b".", b".."):
            text = "path `%s` would leave the device's root: component `%s` is not a name"
            raise ValueError(text % (path, name.decode()))
    for name in names:
        if name[-1] in b". ":
            text = "path `%s`: component `%s` ends in a dot or space, which not every device keeps"
            raise ValueError(text % (path, name.decode()))
    # FAT, which many boards use, ignores case.
    if names[0].lower() == b".mpypi":
        raise ValueError("path `%s` is inside `.mpypi`, which belongs to the agent" % path)


def has_control(data):
    """Whether UTF-8 has a control character: U+0000 to U+001F, U+007F to U+009F."""
    before = 0
    for byte in data:
        if byte < 32 or byte == 127 or before == 0xC2 and byte < 0xA0:
            return True
        before = byte
    return False


def normalized(name):
    """A package's name as in its dist-info folder: lower case, runs of `-`, `_` and `.` made one `_`."""
    name = name.lower().replace("-", "_").replace(".", "_")
    while "__" in name:
        name = name.replace("__", "_")
    return name
