"""What a start of the device needs, and nothing else. The first lines of a user's boot.py are

    from mpypi import boot
    boot.run()

This module imports nothing of ours (and `mpypi/__init__.py` must import nothing when it is imported): after a power cut in
the middle of an update of the agent itself, it may be the only module that fits.
"""


def run(root=""):
    """Finishes or takes back what a journal says, restarts the device where that changed files, counts starts that were
    not confirmed. Once in each start; later calls give the first one's answer. Raises nothing.

    -> as `Store.boot`, without "restart"; ("failed", text) if the flash failed.
    """
    raise NotImplementedError


def confirm(root=""):
    """The application says that the release works: it is kept."""
    raise NotImplementedError
