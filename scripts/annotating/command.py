"""How the commands start and end, and their flags for the machine."""

import sys
from collections.abc import Callable
from typing import Any

from text_to_image_lora import log
from text_to_image_lora.command_line import Parser, count
from text_to_image_lora.errors import InputError, Stopped, TrainingError, explaining_system_errors, stopped_within
from text_to_image_lora.libraries import quiet_libraries, set_num_threads
from text_to_image_lora.training import interruption


def add_machine_flags(parser: Parser, *, batch: str, precision: str) -> None:
    """Adds the flags for the machine; `batch` and `precision` are parts of their help."""
    group = parser.add_argument_group("machine").add_argument
    # fmt: off
    group("--batch_size", type=count(1, 1000), default=4, help=batch)
    group("--mixed_precision", choices=["no", "fp16", "bf16"], help=f"{precision} (default: bf16 or fp16 on CUDA, otherwise no)")
    group("--device", default="auto", help="cpu, cuda, cuda:1 or mps (auto: the fastest available)")
    group("--num_cpu_threads", type=count(1), help="threads for computing on a CPU (default: OMP_NUM_THREADS, or else the number of physical cores that are not busy)")
    # fmt: on


def choose_machine(args: Any) -> tuple[str, Any]:
    """Returns the torch device and dtype of the flags, and sets the number of threads."""
    from text_to_image_lora.drawing.pipeline import choose_device

    device, dtype = choose_device(args.device, args.mixed_precision)
    if device == "cpu":
        set_num_threads(args.num_cpu_threads)
    return device, dtype


def start(what: str) -> None:
    """Starts logging and listens to signals; `what` is what the command makes of a picture, such as "caption"."""
    log.start(warning_format="note: %(message)s")
    quiet_libraries()
    interruption.listen()
    interruption.obey_requests(f"before the first {what}")


def run_command(name: str, main: Callable[[], None]) -> None:
    """Runs a command, and ends the process with one line and its exit code where it fails or is stopped."""
    try:
        with explaining_system_errors():
            main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
    except (Exception, Stopped) as error:
        known = stopped_within(error) or error
        if not isinstance(known, (Stopped, InputError, TrainingError)):
            raise
        print(f"{name}: {' '.join(str(known).split())}", file=sys.stderr)
        sys.exit(known.exit_code)
