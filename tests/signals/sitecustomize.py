"""Python runs this as it starts if PYTHONPATH names this folder: a signal at the n-th renaming to a name.

The signal comes neither too early nor too late, however fast or busy a machine is.
"""

import os
import signal
import sys

ending, number, name, receiver = os.environ["SIGNAL_AT"].split()
seen = 0


def watch(event: str, arguments: tuple) -> None:
    global seen
    if event == "os.rename" and str(arguments[1]).endswith(ending):
        seen += 1
        if seen == int(number):
            send = os.killpg if receiver == "group" else os.kill
            process = {"group": os.getpgrp, "parent": os.getppid, "itself": os.getpid}[receiver]
            send(process(), getattr(signal, name))


sys.addaudithook(watch)
