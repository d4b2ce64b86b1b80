"""
What every script shares: flags and their JSON file, errors of one line, Ctrl-C, torchrun's
processes, what a stored thing was made of, and who may write it.
"""

import os

# Large pages, which PyTorch asks for where this is set, take a twentieth off a step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import contextlib
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout

from metapt import InputError, digest, first_line, input_errors, read_json, write_atomically
from metapt import write_json

MODEL = "google-t5/t5-base"  # Section 5.1
MAX_LENGTH = 256  # tokens of H(x); the paper names none
CONTINUES = "the same command, without --restart, continues"

# ------------------------------------------------------------------------------------------- Flags


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help texts that end in their defaults, where there are any."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults shown, flags from a JSON file, and errors of
    one line."""

    def __init__(self, description=None, **kwargs):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=Help, **kwargs
        )

    def add_config(self):
        """The flag that parse() reads first."""
        self.add_argument(
            "--config",
            metavar="FILE",
            help="a JSON file of flags, as arguments.json is; flags beside it win",
        )

    def add_machine(self):
        """The flags that say where a script computes."""
        machine = self.add_argument_group("the machine")
        machine.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
        machine.add_argument(
            "--threads", type=number(1), help="CPU threads (default: as PyTorch chooses)"
        )
        return machine

    def parse(self, argv=None):
        """The arguments, those of the file --config first, so that others win. Raises InputError
        for that file."""
        argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")
        config = first.parse_known_args(argv)[0].config
        if config:
            self.prog += f" --config {config}"
            argv = flags_of(read_json(config)) + argv
        return self.parse_args(argv)

    def error(self, message):
        """Ends in one line."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def flags_of(values):
    """Values by their flags' names, as words of a command line."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(one) for one in (value if isinstance(value, list) else [value])]
    return words


LARGEST = 2**63 - 1  # of PyTorch's whole numbers, its seeds among them


def number(least, most=LARGEST):
    """What a flag takes: a number from `least` to `most`, a whole one where `least` is."""

    def parse(text):
        """The number, or argparse's error that says what fits."""
        with contextlib.suppress(ValueError):
            value = type(least)(text)
            if least <= value <= most:
                return value
        kind = "a whole number" if type(least) is int else "a number"
        limit = f"from {least} to {most}" if most < LARGEST else f"of {least} or more"
        raise argparse.ArgumentTypeError(f"{text} is not {kind} {limit}")

    return parse


def path(text):
    """What a flag takes: a path, without a slash at its end, since results name a folder by it."""
    return str(Path(text))


def add_precision(machine):
    """The flags that say in which precision a prompt's script computes."""
    machine.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float64"],
        help="precision of T5's weights; the prompt is float32 at least",
    )
    machine.add_argument(
        "--matmul",
        default="highest",
        choices=["highest", "high", "medium"],
        help="precision of float32 products; high is TF32",
    )


def set_machine(args):
    """Sets the threads, the device and the precision that the arguments name. Raises InputError."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with input_errors(f"--device {args.device}", "give cpu or cuda"):
        torch.empty(0, device=args.device)
    if args.device == "cuda" and rank_and_world()[1] > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(getattr(args, "matmul", "highest"))


def save_arguments(file, args):
    """Writes the arguments that a script ran with as JSON, which --config reads."""
    omitted = ("config", "restart")
    write_json(file, {name: value for name, value in vars(args).items() if name not in omitted})


# ----------------------------------------------------- What a stored thing was made of, and by whom

OURS = ("arguments.json", "log.jsonl", "metapt.json")  # notes beside a model, and no part of it


def contents(name):
    """What the name of a model stands for today: of a folder the digest of all files in it, of a
    hub's model the name and the commit. Raises InputError."""
    folder = Path(name)
    if not folder.is_dir():
        with input_errors(name, "give a model by hub name or folder"):
            config = transformers.AutoConfig.from_pretrained(name)
        return f"{name}@{getattr(config, '_commit_hash', None)}"

    files = {}
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if file.is_file() and not hidden and file.name not in OURS:
            files[inner.as_posix()] = digest(file)
    return digest(files)


def check_same(place, before, now, longer=()):
    """Raises InputError where what an earlier run in `place` was made of is not today's, and names
    the first that differs; what `longer` lists may be larger than it was."""
    for name, value in now.items():
        known = before.get(name)
        grown = name in longer and isinstance(known, int) and value >= known
        if value != known and not grown:
            raise InputError(
                f"{place}: this run began with {name} {known}, not {value}; give that again to "
                "continue it, or another --out; --restart begins anew"
            )


@contextlib.contextmanager
def only_writer(place, wait=False):
    """Within it no other command writes `place`: a second one waits, or else raises InputError. The
    lock is freed with the process, however it ends."""
    place = Path(place).resolve()
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    with input_errors(place, "give a place that can be written"):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise InputError(
                f"{place}: another command is at work on it; wait for that, or give another --out"
            )
    try:
        yield
    finally:
        lock.release()


def provenance(device):
    """What a result can be traced by: versions, device, threads, git commit (None without one)."""
    commit = None
    with contextlib.suppress(OSError):  # where there is no git
        show = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(show, capture_output=True, text=True).stdout.strip() or None

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    gpu = torch.device(device).type == "cuda"
    return {
        "versions": {**versions, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def save_figure(path, figure):
    """Writes one of matplotlib's figures, as what the path ends in: .png, .pdf or .svg, say. Raises
    InputError."""
    options = {"format": Path(path).suffix[1:], "dpi": 100, "bbox_inches": "tight"}
    write_atomically(path, lambda file: figure.savefig(file, **options))
    print(f"wrote {path}")


# ---------------------------------------------------------------------------- Processes and signals


def rank_and_world():
    """This process's number and how many processes torchrun started; 0 and 1 without it. Clusters
    set variables of these names too, and do not count."""
    if not torch.distributed.is_torchelastic_launched():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def stop_signal():
    """Within `with stop_signal() as stop`, Ctrl-C, SIGTERM and SIGHUP only make `stop` true: the
    loop ends its step first. Where it did not act on one, that comes through at the end."""
    stop = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # and not in a notebook or a server
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[kind] = signal.signal(kind, lambda kind, frame: stop.append(kind))
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    if stop:  # it came too late for any step, but not for what would follow
        signal.raise_signal(stop[-1])


def run(main):
    """Runs a script's main; bad input ends in one line on standard error and exit status 2."""
    transformers.utils.logging.disable_progress_bar()  # the scripts have their own
    transformers.utils.logging.set_verbosity_error()
    try:
        main()
    except InputError as error:
        exit_with(error, 2)
    except torch.OutOfMemoryError:
        exit_with("the GPU is out of memory; lower --tasks-per-pass, --batch-size, --max-length", 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        exit_with(f"{place}{first_line(error)}; check the path", 2)
    except KeyboardInterrupt as stop:
        exit_with(str(stop) or "stopped; give the same command again", 130)


def exit_with(message, status):
    """Ends the script with one line."""
    line = " ".join(f"{Path(sys.argv[0]).name}: {message}".split())[:1000]
    print(line, file=sys.stderr)
    sys.exit(status)
