# Runs mpremote against MicroPython's Unix port as if that were a board on a serial line:
#
#   python3 serial.py MICROPYTHON MPREMOTE FOLDER ARGUMENT...
#
# MicroPython runs in FOLDER behind one pseudo-terminal, mpremote opens another, and bytes pass between the two.

import os
import pty
import subprocess
import sys
import threading
import tty


def carry(source, target):
    while True:
        try:
            piece = os.read(source, 4096)
        except OSError:
            return
        if not piece:
            return
        while piece:
            piece = piece[os.write(target, piece):]


micropython, mpremote, folder, *arguments = sys.argv[1:]
ours, boards = pty.openpty()
line, device = pty.openpty()
tty.setraw(boards)
tty.setraw(device)
board = subprocess.Popen([micropython, "-i"], stdin=boards, stdout=boards, stderr=boards, cwd=folder,
                         start_new_session=True)
os.close(boards)
for source, target in ((ours, line), (line, ours)):
    threading.Thread(target=carry, args=(source, target), daemon=True).start()
try:
    # `resume`: the Unix port ends where a board starts anew.
    command = [mpremote, "connect", os.ttyname(device), "resume", *arguments]
    sys.exit(subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60).returncode)
finally:
    board.kill()
    board.wait()
