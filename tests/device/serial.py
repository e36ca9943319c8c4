"""Puts MicroPython behind a serial line, as a board is, and runs mpremote on it. CPython's, not a device's.

    serial.py MICROPYTHON MPREMOTE FOLDER ARGUMENTS…

The board's files are in FOLDER. Ends as mpremote does.
"""

import os
import pty
import select
import subprocess
import sys
import tty

micropython, mpremote, folder, *arguments = sys.argv[1:]
board, board_end = pty.openpty()
line, line_end = pty.openpty()
for end in (board_end, line_end):
    tty.setraw(end)
python = subprocess.Popen([micropython], stdin=board_end, stdout=board_end, stderr=board_end, cwd=folder)
tool = subprocess.Popen([mpremote, "connect", os.ttyname(line_end), "resume", *arguments])
while tool.poll() is None and python.poll() is None:
    for ready in select.select([board, line], [], [], 0.1)[0]:
        os.write(line if ready == board else board, os.read(ready, 4096))
python.kill()
python.wait()
sys.exit(tool.wait())
