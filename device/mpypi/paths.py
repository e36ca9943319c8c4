"""Names: of files that stay inside a device's root, and of channels."""

from . import limits

# The folder that belongs to the agent.
_RESERVED = ".mpypi"


def check_path(path):
    """Raises `ValueError` unless `path` names a file inside the device's root: the rules and texts of
    protocol/src/path.rs."""
    if not path:
        raise ValueError("a path must not be empty")
    length = len(path.encode())
    if length > limits.PATH:
        raise ValueError("a path of %d bytes is longer than %d" % (length, limits.PATH))
    components = path.count("/") + 1
    if components > limits.PATH_COMPONENTS:
        raise ValueError("a path of %d components has more than %d" % (components, limits.PATH_COMPONENTS))
    for character in path:
        code = ord(character)
        if code < 0x20 or 0x7F <= code < 0xA0 or character in "\\:":
            raise ValueError(
                "path `%s` has the character %r, which not every device can store" % (path, character)
            )
    names = path.split("/")
    for name in names:
        if name in ("", ".", ".."):
            raise ValueError(
                "path `%s` would leave the device's root: component `%s` is not a name" % (path, name)
            )
    for name in names:
        if name[-1] in ". ":
            raise ValueError(
                "path `%s`: component `%s` ends in a dot or space, which not every device keeps" % (path, name)
            )
    # FAT, which many boards use, ignores case.
    if names[0].lower() == _RESERVED:
        raise ValueError("path `%s` is inside `%s`, which belongs to the agent" % (path, _RESERVED))


def consists(text, more):
    """Whether `text` has only ASCII letters and digits, and `more`."""
    for char in text:
        if not ("a" <= char <= "z" or "A" <= char <= "Z" or "0" <= char <= "9" or char in more):
            return False
    return True


def channel_problem(name):
    """What is wrong with the name of a channel."""
    if 0 < len(name) <= limits.CHANNEL_NAME and consists(name, "._-") and consists(name[0], ""):
        return None
    return "`%s` is no channel name: use letters, digits, `.`, `_` and `-`, a letter or digit first" % name[:80]
