"""Commands named `python` and `accelerate` that start without the seconds of PyTorch's imports.

    quick = QuickPython(folder)
    subprocess.run([quick.python, "infer.py", "--help"])
    subprocess.run(["bash", "-c", "accelerate launch infer.py"], env=os.environ | quick.environment)

A command passes its arguments, working directory, environment and streams to a server, which has imported the libraries
and forks a process. This process runs the script or module as Python does; Python processes that it starts do it this way too.
If a command is killed, its process is killed too.
"""

import array
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

from quick_start import import_libraries, run_and_leave


CLIENT = """\
#!{python} -IS
import array, json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([{words!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(request)
answer = server.recv(8)
sys.exit(int(answer) if answer else "the process has ended without an exit code")
"""
COMMANDS = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}


class QuickPython:
    """Writes both commands into a new folder and serves them until `close`."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder / "socket")
        self.python = str(folder / "python")
        for name, words in COMMANDS.items():
            client = CLIENT.format(python=sys.executable, address=self.address, words=words)
            (self.folder / name).write_text(client)
            (self.folder / name).chmod(0o755)
        self.process = subprocess.Popen([sys.executable, __file__, self.address], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    @property
    def environment(self) -> dict[str, str]:
        """The change of the environment with which shells find the commands."""
        return {"PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def receive(connection):
    """Returns the words, the working directory and the environment of a request, and its three streams."""
    size, [(_, _, streams)], *_ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    left, parts = int.from_bytes(size, "big"), []
    while left:
        parts.append(connection.recv(left))
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), array.array("i", streams)


def become(words, folder, environment, streams):
    """Turns the forked process into Python with these words on its command line."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = open(0), *(open(stream, "w", buffering=1) for stream in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment

    def run():
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], folder
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(folder, words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")

    if words[0] != "-m" and not words[0].endswith(".py"):  # such as -c, which needs no libraries
        os.execv(sys.executable, [sys.executable, *words])
    sys.executable = str(Path(sys.argv[1]).with_name("python"))
    run_and_leave(run)


def serve(address):
    """Forks two processes for each connection, of which one waits for the other, until this process is terminated."""
    import_libraries()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the waiting ones
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        if os.fork():
            connection.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request, streams = receive(connection)
        child = os.fork()
        if child == 0:
            connection.close()
            become(*request, streams)
        status = wait(child, connection)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


def wait(child, connection):
    """Waits for a process and returns its status; kills it if the command that asked for it has been killed."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if select.select([connection], [], [], 0.01)[0]:
            os.kill(child, signal.SIGKILL)  # a run would finish its step after SIGTERM
            return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    serve(sys.argv[1])
