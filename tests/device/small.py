# As short as a user's main.py: server, root, CA and key file, `-` for none; then where to measure, or
# nothing.
import sys

server, root, ca, keys = [None if argument == "-" else argument for argument in sys.argv[1:5]]


def restart():
    sys.exit(7)


def say(text):
    print(text)


if len(sys.argv) > 5:
    # With all of the agent in memory, as where memory is plenty: what is alive when it waits on its first
    # connection, and the most that is alive from then on, looked at wherever the agent asks for a length: in
    # every step, and for every piece of a package.
    import builtins
    import gc

    import mpypi.warm

    for name in mpypi.warm.MODULES.split(" ") + ["rsa", "tags", "names"]:
        __import__("mpypi." + name)
    real_len, real_import = builtins.len, builtins.__import__
    seen = [0, 0]

    def watched_len(of):
        gc.collect()
        seen[1] = max(seen[1], gc.mem_alloc())
        return real_len(of)

    def watched_import(name, *more):
        module = real_import(name, *more)
        if name == "mpypi.listen" and not seen[0]:
            gc.collect()
            seen[0] = gc.mem_alloc()
            builtins.len = watched_len
        return module

    builtins.__import__ = watched_import

    def restart():
        print("heap", seen[0], seen[1])
        sys.exit(7)


import mpypi

print(mpypi.check(server, "dev", "board", root, keys, ca=ca, confirm_after=0, restart=restart, log=say))
