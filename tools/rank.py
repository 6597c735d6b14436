"""One rank of ./run.sh: train_gpt.py in a process that ends with its launcher, and without a traceback at Ctrl-C."""
import os
import runpy
import signal
import sys
import threading
import time


def follow_launcher(launcher: int) -> None:
    """Send this process SIGTERM once its launcher is gone, as after kill -9: the run saves what it can, and ends."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))  # until the trainer sets its own
    launcher = int(os.environ["LAUNCHED_BY"])
    threading.Thread(target=follow_launcher, args=[launcher], daemon=True).start()
    sys.argv[0] = "train_gpt.py"
    runpy.run_path("train_gpt.py", run_name="__main__")
