"""Code in processes of their own that need not import torch and transformers anew (ten seconds): each is forked from a server that has."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["gcpo.train", "gcpo.explore", "transformers.models.llama.modeling_llama", "peft", "datasets", "plotly.express", "nbdev.test"])


def _become(printed: str, code: str, arguments: list[str]) -> None:
    file = os.open(printed, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def warm(code: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    "`python -c code arguments` in the working directory and environment that the tests began with; stdout holds all that was printed."
    with tempfile.TemporaryDirectory() as place:
        printed = Path(place) / "printed"
        printed.touch()
        process = _server.Process(target=_become, args=(str(printed), code, [*map(str, arguments)]))
        process.start()
        process.join(timeout)
        if late := process.is_alive():
            process.kill()
            process.join()
        return subprocess.CompletedProcess(code, process.exitcode, printed.read_text() + (f"\nno end after {timeout} s" if late else ""))
