"""One rank of ./run.sh: train_gpt.py, ended with its launcher, and by Ctrl-C without a traceback."""
import os
import runpy
import signal
import sys
import threading
import time


def follow_launcher(launcher: int) -> None:
    """End this process by SIGTERM, so that it saves, once its launcher is gone, as after kill -9."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    # Until the trainer sets a handler of its own, which is once torch is imported.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    launcher = int(os.environ["LAUNCHED_BY"])
    threading.Thread(target=follow_launcher, args=[launcher], daemon=True).start()
    sys.argv[0] = "train_gpt.py"
    runpy.run_path("train_gpt.py", run_name="__main__")
