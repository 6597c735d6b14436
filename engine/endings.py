"""How a run ends: by a signal, or by an error that becomes one sentence and an exit code."""
import contextlib
import os
import signal
import socket
import sys
import threading

import torch
import torch.distributed as dist

from data.errors import ADVICE, RunError, UsageError, refused_by_system, steady_streams

# ------------------------------------------------------------------------------------------------------------
# Signals


class Stopped(SystemExit):
    """A signal ended the run: exit code 128 + its number, as of any program that a signal ends."""

    def __init__(self, number: int, advice: str = ""):
        super().__init__(128 + number)
        self.text = f"by {signal.Signals(number).name}{advice}"

    def __str__(self):
        return self.text


class StopSignal:
    """Ctrl-C, SIGTERM, and SIGHUP unless the run was started to ignore it (nohup).

    Once a run can save, the first signal only sets `number`, and the run goes on to a step at which all ranks
    agree to save and end. Before, or at a second signal, the process leaves at once.

    Python handles a signal when the main thread is back from C, which a rank that waits in a collective for
    one that has left may never be. So a thread, told of signals through a pipe, ends the process if after
    PATIENCE seconds neither the handler has nor the run has called agreed(). torchrun kills 30 seconds after
    it has sent SIGTERM.
    """
    PATIENCE = 20.0

    def __init__(self):
        self.number = 0  # of the first signal; 0: none came
        self.can_save = False
        self.calm = threading.Event()

    def __enter__(self):
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.agreed()
        signal.set_wakeup_fd(self.fd_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.writer.close()  # ends the thread

    def handle(self, number, frame):
        if self.number or not self.can_save:
            raise Stopped(number)
        self.number = number

    def agreed(self):
        """Say that all ranks know of the signal, so that nobody has to be ended by force."""
        self.calm.set()

    def watch(self):
        number = self.reader.recv(1)
        if number and not self.calm.wait(self.PATIENCE if self.can_save else 2.0):
            os._exit(128 + number[0])
        self.reader.close()


# ------------------------------------------------------------------------------------------------------------
# Errors

LOST_CONTACT = 3  # exit code under tools/launch.py, which alone knows which rank ended and why

ALONE = ("expected all ranks to go on, found one gone without a word; see what ended it (often a lack of "
         "memory), then start again or go on from a checkpoint: --resume=PATH")


def explain(e: Exception) -> str | None:
    """Return a sentence about what torch raises where a machine lacks something, else None."""
    found = (str(e).splitlines() or [""])[0]
    kinds = {kind.__name__ for kind in type(e).__mro__}
    if isinstance(e, torch.OutOfMemoryError) or "out of memory" in found or "can't allocate memory" in found:
        return (f"expected enough memory, found: {found}; --recompute=on needs far less for the same "
                "training, a higher --slices or lower --val_slice shortens sequences; python -m tools.plan "
                "says what fits")
    if kinds & {"BackendCompilerFailed", "TritonMissing"}:
        return (f"expected torch.compile to work here, found: {found}; install a C++ compiler and Triton, or "
                "train without by --compile=off; TORCHDYNAMO_VERBOSE=1 shows more")
    if any(word in str(e) for word in ("Connection", "connection", "Timed out", "NCCL", "peer")):
        return ALONE
    return None


def report(main, argv: list[str], name: str = "train_gpt.py") -> int:
    """Return the exit code of main(argv, stop): 2 for a wrong command or input, 1 for a failed run. An error
    is printed here and nowhere else, by the first rank that meets one, after the program's name."""
    code, message = 0, None
    steady_streams()
    with StopSignal() as stop:
        try:
            code = main(argv, stop) or 0
        except Stopped as e:
            code = e.code
        except UsageError as e:
            code, message = 2, str(e)
        except RunError as e:
            code, message = 1, str(e)
        except OSError as e:
            if e.errno not in ADVICE:
                raise
            code, message = 1, refused_by_system(e)
        except RuntimeError as e:
            code, message = 1, explain(e)
            if message is None:
                raise
            if message is ALONE and "LAUNCHED_BY" in os.environ:
                code, message = LOST_CONTACT, None
        if code and first_to_end() and message:
            print(f"{name}: {message}", file=sys.stderr, flush=True)
    return code


def first_to_end() -> bool:
    """Return whether this rank is the first one to end early: one of them speaks for all."""
    if not dist.is_initialized():  # so early that all ranks of a machine meet the same error
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("ended early", 1) == 1
    except RuntimeError:  # the store is gone with the rank or the torchrun that held it
        return dist.get_rank() == 0


def leave(code: int):
    """End this process without the interpreter's clean-up. There, threads of gloo and NCCL that still release
    a tensor would now and then abort it ("terminate called without an active exception")."""
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
